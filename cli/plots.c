// SPDX-License-Identifier: Apache-2.0
//
// gnuplot as a child: commands from a file without a name, the drawing through a pipe. Not both through pipes, since
// each side could wait for the other to read.
#include <fcntl.h>
#include <libxml/parser.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "plots.h"

#define NOT_FOUND 127 // exit code of a child that could not become gnuplot, where posix_spawnp cannot say so itself

// ---------------------------------------------------------------- the child

// Signals that this program waits for in a thread are blocked in all others, and a child inherits that.
static bool set_attributes(posix_spawnattr_t *attributes) {
    sigset_t none;
    return sigemptyset(&none) == 0 && posix_spawnattr_setsigmask(attributes, &none) == 0 &&
           posix_spawnattr_setflags(attributes, POSIX_SPAWN_SETSIGMASK) == 0;
}

// Its input is `commands`, its output `to`; what it complains about is nobody's business here. -d: no settings of the
// user, which would change the drawing.
static int start_gnuplot(int commands, int to, pid_t *child) {
    static char                arg0[] = "gnuplot", arg1[] = "-d", arg2[] = "-", locale[] = "LC_ALL=C.UTF-8";
    char *const                words[] = {arg0, arg1, arg2, NULL};
    char                       path[4096] = "PATH=";
    char *const                environment[] = {locale, path, NULL};
    const char                *search = getenv("PATH");
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t          attributes;
    if (search != NULL) (void)snprintf(path, sizeof path, "PATH=%s", search);
    if (posix_spawn_file_actions_init(&actions) != 0) return -1;
    if (posix_spawnattr_init(&attributes) != 0) {
        (void)posix_spawn_file_actions_destroy(&actions);
        return -1;
    }
    int result = -1;
    if (set_attributes(&attributes) && posix_spawn_file_actions_adddup2(&actions, commands, STDIN_FILENO) == 0 &&
        posix_spawn_file_actions_adddup2(&actions, to, STDOUT_FILENO) == 0 &&
        posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0) == 0)
        result = posix_spawnp(child, arg0, &actions, &attributes, words, environment);
    (void)posix_spawnattr_destroy(&attributes);
    (void)posix_spawn_file_actions_destroy(&actions);
    return result;
}

static bool read_all(int from, FILE *to) {
    char    block[8192];
    ssize_t n;
    while ((n = read(from, block, sizeof block)) > 0) (void)fwrite(block, 1, (size_t)n, to);
    return n == 0;
}

static bool open_pipe(int ends[2]) {
    if (pipe(ends) != 0) return false;
    // neither end stays open in the child: it would wait for an end that it holds itself
    (void)fcntl(ends[0], F_SETFD, FD_CLOEXEC);
    (void)fcntl(ends[1], F_SETFD, FD_CLOEXEC);
    return true;
}

// The drawing as gnuplot wrote it.
static plot_result draw(FILE *commands, FILE *to) {
    int   ends[2], code = 0;
    pid_t child = -1;
    if (!open_pipe(ends)) return PLOT_FAILED;
    int started = start_gnuplot(fileno(commands), ends[1], &child);
    (void)close(ends[1]);
    bool read = started == 0 && read_all(ends[0], to);
    (void)close(ends[0]);
    if (started != 0) return PLOT_NO_GNUPLOT;
    if (waitpid(child, &code, 0) != child || !WIFEXITED(code)) return PLOT_FAILED;
    if (WEXITSTATUS(code) == NOT_FOUND) return PLOT_NO_GNUPLOT;
    return read && WEXITSTATUS(code) == 0 ? PLOT_DRAWN : PLOT_FAILED;
}

// ---------------------------------------------------------------- the drawing

// gnuplot's own title and description would show up under the mouse.
static void remove_titles(xmlNode *root) {
    for (xmlNode *next, *node = root->children; node != NULL; node = next) {
        next = node->next;
        if (xmlStrEqual(node->name, BAD_CAST "title") == 0 && xmlStrEqual(node->name, BAD_CAST "desc") == 0) continue;
        xmlUnlinkNode(node);
        xmlFreeNode(node);
    }
}

// Read and written again, so that whatever comes is well-formed or not there at all.
static char *embed(const char *text, size_t bytes, const char *title) {
    xmlDoc    *document = xmlReadMemory(text, (int)bytes, "plot.svg", NULL,
                                        XML_PARSE_NONET | XML_PARSE_NOERROR | XML_PARSE_NOWARNING | XML_PARSE_NOBLANKS);
    xmlNode   *root = document != NULL ? xmlDocGetRootElement(document) : NULL;
    xmlBuffer *buffer = root != NULL ? xmlBufferCreate() : NULL;
    char      *svg = NULL;
    if (buffer != NULL && xmlStrEqual(root->name, BAD_CAST "svg")) {
        remove_titles(root);
        (void)xmlUnsetProp(root, BAD_CAST "width");
        (void)xmlUnsetProp(root, BAD_CAST "height");
        (void)xmlSetProp(root, BAD_CAST "role", BAD_CAST "img");
        (void)xmlSetProp(root, BAD_CAST "aria-label", BAD_CAST title);
        if (xmlNodeDump(buffer, document, root, 0, 0) > 0) svg = strdup((const char *)xmlBufferContent(buffer));
    }
    if (buffer != NULL) xmlBufferFree(buffer);
    if (document != NULL) xmlFreeDoc(document);
    return svg;
}

plot_result plot_run(const char *commands, size_t bytes, const char *title, char **svg) {
    char       *text = NULL;
    size_t      length = 0;
    plot_result result = PLOT_FAILED;
    FILE       *in = tmpfile(), *out = open_memstream(&text, &length);
    if (in != NULL && out != NULL && fwrite(commands, 1, bytes, in) == bytes && fflush(in) == 0 &&
        fseek(in, 0, SEEK_SET) == 0 && lseek(fileno(in), 0, SEEK_SET) == 0)
        result = draw(in, out);
    if (in != NULL) (void)fclose(in);
    if (out != NULL && fclose(out) != 0) result = PLOT_FAILED;
    if (result == PLOT_DRAWN) {
        *svg = embed(text, length, title);
        if (*svg == NULL) result = PLOT_FAILED;
    }
    free(text);
    return result;
}
