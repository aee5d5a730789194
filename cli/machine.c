// SPDX-License-Identifier: Apache-2.0
//
// What the machine is and has. Matrix libraries choose their code by the processor's instruction sets, and other code
// may round other last bits, so an artifact records what it was made on.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>

#include "kvq_cli.h"

// True when `flag` is one of the words of `line`.
static bool has_word(const char *line, const char *flag) {
    size_t length = strlen(flag);
    for (const char *at = strstr(line, flag); at != NULL; at = strstr(at + 1, flag)) {
        bool starts = at == line || at[-1] == ' ';
        if (starts && strchr(" \n", at[length]) != NULL) return true;
    }
    return false;
}

void kvq_cli_describe_cpu(char *out, size_t n) {
    static const char *const FLAGS[] = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"};
    char                     line[8192]; // the flags line of current processors has about 2000 characters
    bool                     have_name = false;
    (void)snprintf(out, n, "unknown");
    FILE *file = fopen("/proc/cpuinfo", "r");
    if (file == NULL) return;
    while (fgets(line, sizeof line, file) != NULL) {
        char *value = strchr(line, ':');
        if (value == NULL) continue;
        value += strspn(value, ": ");
        if (strncmp(line, "model name", 10) == 0 && !have_name) {
            have_name = true;
            (void)snprintf(out, n, "%.*s", (int)strcspn(value, "\n"), value);
        }
        if (strncmp(line, "flags", 5) != 0) continue;
        for (int i = 0; i < CLI_COUNT_OF(FLAGS); i++) {
            size_t used = strlen(out);
            if (has_word(value, FLAGS[i])) (void)snprintf(out + used, n - used, " %s", FLAGS[i]);
        }
        break; // one processor speaks for all
    }
    (void)fclose(file);
}

double kvq_cli_free_bytes(const char *path) {
    char           folder[4096];
    struct statvfs disk;
    size_t         length = strlen(path);
    if (length >= sizeof folder) return -1;
    memcpy(folder, path, length + 1);
    if (statvfs(folder, &disk) != 0) { // not there yet: its parent is
        char *slash = strrchr(folder, '/');
        if (slash == NULL) {
            strcpy(folder, ".");
        } else {
            slash[slash == folder] = 0; // the root keeps its slash
        }
        if (statvfs(folder, &disk) != 0) return -1;
    }
    return (double)disk.f_bavail * (double)disk.f_frsize;
}

// A line of /proc/self/status such as "VmRSS:     5676 kB".
static int64_t process_bytes(const char *name) {
    char    line[256];
    int64_t bytes = -1;
    size_t  length = strlen(name);
    FILE   *file = fopen("/proc/self/status", "r");
    if (file == NULL) return -1;
    while (bytes < 0 && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, name, length) == 0 && line[length] == ':')
            bytes = 1024 * strtoll(line + length + 1, NULL, 10);
    }
    (void)fclose(file);
    return bytes;
}

int64_t kvq_resident_memory(void) { return process_bytes("VmRSS"); }
int64_t kvq_peak_memory(void) { return process_bytes("VmHWM"); }

bool kvq_cli_under_mpirun(void) {
    static const char *const SIZES[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}; // Open MPI; MPICH and Slurm
    for (int i = 0; i < CLI_COUNT_OF(SIZES); i++) {
        const char *size = getenv(SIZES[i]);
        if (size != NULL && strtol(size, NULL, 10) > 1) return true;
    }
    return false;
}
