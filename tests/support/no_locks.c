/* Preloaded into an unmodified program: file locks below NO_LOCKS_ROOT are refused, as on NFS without its lock daemon. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

static int below(int fd) {
    const char *root = getenv("NO_LOCKS_ROOT");
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0 || !root) return 0;
    path[n] = 0;
    return strncmp(path, root, strlen(root)) == 0;
}

static int locks(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_GETLK || command == F_OFD_SETLK ||
           command == F_OFD_SETLKW || command == F_OFD_GETLK;
}

#define WITHOUT_LOCKS(name)                                                   \
    int name(int fd, int command, ...) {                                      \
        static int (*real)(int, int, ...);                                    \
        if (!real) real = dlsym(RTLD_NEXT, #name);                            \
        va_list list;                                                         \
        va_start(list, command);                                              \
        void *argument = va_arg(list, void *);                                \
        va_end(list);                                                         \
        if (!locks(command) || !below(fd)) return real(fd, command, argument); \
        errno = ENOLCK;                                                       \
        return -1;                                                            \
    }

#undef fcntl
WITHOUT_LOCKS(fcntl)
WITHOUT_LOCKS(fcntl64)

int flock(int fd, int operation) {
    static int (*real)(int, int);
    if (!real) real = dlsym(RTLD_NEXT, "flock");
    if (!below(fd)) return real(fd, operation);
    errno = ENOLCK;
    return -1;
}
