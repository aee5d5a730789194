// SPDX-License-Identifier: Apache-2.0
//
// Private to the reports in XML: a document that grows from front to back. As with kvq_json a failure is remembered and
// comes out at the end. Texts may hold anything; what XML cannot hold becomes a replacement character.
#ifndef KVQ_XML_REPORT_H
#define KVQ_XML_REPORT_H

#include <stdio.h>

#include "kvq_cli.h"

typedef struct kvq_xml {
    struct _xmlTextWriter *writer;
    struct _xmlBuffer     *buffer;
    bool                   failed;
} kvq_xml;

void       kvq_xml_init(kvq_xml *xml, bool html); // html: begins as a page of HTML 5 that is well-formed XML as well
void       kvq_xml_free(kvq_xml *xml);
void       kvq_xml_open(kvq_xml *xml, const char *name);
void       kvq_xml_attribute(kvq_xml *xml, const char *name, const char *value); // right behind open
void       kvq_xml_text(kvq_xml *xml, const char *text);
void       kvq_xml_raw(kvq_xml *xml, const char *markup);                     // well-formed markup, as it is
void       kvq_xml_close(kvq_xml *xml);                                       // <a></a> where nothing was inside, ...
void       kvq_xml_close_void(kvq_xml *xml);                                  // ... <a/>
void       kvq_xml_element(kvq_xml *xml, const char *name, const char *text); // open, text, close
kvq_status kvq_xml_write(kvq_xml *xml, FILE *out, kvq_error *err);            // ends the document

#endif
