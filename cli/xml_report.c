// SPDX-License-Identifier: Apache-2.0
//
// Documents by the writer of libxml2, which knows what must be escaped where.
#include <libxml/xmlwriter.h>
#include <stdlib.h>
#include <string.h>

#include "xml_report.h"

static void note(kvq_xml *xml, int result) { xml->failed = xml->failed || result < 0; }

void kvq_xml_init(kvq_xml *xml, bool html) {
    xml->buffer = xmlBufferCreate();
    xml->writer = xml->buffer != NULL ? xmlNewTextWriterMemory(xml->buffer, 0) : NULL;
    xml->failed = xml->writer == NULL;
    if (xml->failed) return;
    if (html) {
        note(xml, xmlTextWriterWriteDTD(xml->writer, BAD_CAST "html", NULL, NULL, NULL));
        note(xml, xmlTextWriterWriteRaw(xml->writer, BAD_CAST "\n"));
    } else {
        note(xml, xmlTextWriterSetIndent(xml->writer, 1));
        note(xml, xmlTextWriterStartDocument(xml->writer, NULL, "UTF-8", NULL));
    }
}

void kvq_xml_free(kvq_xml *xml) {
    if (xml->writer != NULL) xmlFreeTextWriter(xml->writer);
    if (xml->buffer != NULL) xmlBufferFree(xml->buffer);
    xml->writer = NULL;
    xml->buffer = NULL;
}

// XML has no place for control characters, not even escaped ones, nor for U+FFFE and U+FFFF.
static char *valid_text(const char *text) {
    char *copy = kvq_cli_valid_text(text);
    for (char *c = copy; c != NULL && *c != 0; c++) {
        unsigned char byte = (unsigned char)*c;
        if ((byte < 0x20 && strchr("\t\n\r", byte) == NULL) || byte == 0x7f) *c = '?';
        if (strncmp(c, "\xef\xbf\xbe", 3) == 0 || strncmp(c, "\xef\xbf\xbf", 3) == 0) c[2] = '\xbd';
    }
    return copy;
}

void kvq_xml_open(kvq_xml *xml, const char *name) {
    if (!xml->failed) note(xml, xmlTextWriterStartElement(xml->writer, BAD_CAST name));
}

void kvq_xml_attribute(kvq_xml *xml, const char *name, const char *value) {
    char *text = valid_text(value);
    if (!xml->failed)
        note(xml, text != NULL ? xmlTextWriterWriteAttribute(xml->writer, BAD_CAST name, BAD_CAST text) : -1);
    free(text);
}

void kvq_xml_text(kvq_xml *xml, const char *value) {
    char *text = valid_text(value);
    if (!xml->failed) note(xml, text != NULL ? xmlTextWriterWriteString(xml->writer, BAD_CAST text) : -1);
    free(text);
}

void kvq_xml_raw(kvq_xml *xml, const char *markup) {
    if (!xml->failed) note(xml, xmlTextWriterWriteRaw(xml->writer, BAD_CAST markup));
}

void kvq_xml_close(kvq_xml *xml) {
    if (!xml->failed) note(xml, xmlTextWriterFullEndElement(xml->writer));
}

void kvq_xml_close_void(kvq_xml *xml) {
    if (!xml->failed) note(xml, xmlTextWriterEndElement(xml->writer));
}

void kvq_xml_element(kvq_xml *xml, const char *name, const char *text) {
    kvq_xml_open(xml, name);
    kvq_xml_text(xml, text);
    kvq_xml_close(xml);
}

kvq_status kvq_xml_write(kvq_xml *xml, FILE *out, kvq_error *err) {
    if (!xml->failed) note(xml, xmlTextWriterEndDocument(xml->writer));
    if (!xml->failed) note(xml, xmlTextWriterFlush(xml->writer));
    if (xml->failed) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "XML report: could not allocate it");
    (void)fwrite(xmlBufferContent(xml->buffer), 1, (size_t)xmlBufferLength(xml->buffer), out);
    return KVQ_OK;
}
