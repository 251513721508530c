/* Preloaded into an unmodified program: kills it with SIGKILL before or after the KILL_AT-th file event below KILL_ROOT
   (counted from 1 over all threads; odd numbers before, even numbers after an event), or, with KILL_AT=0, appends a line
   for each event to KILL_LOG. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_int seen;

static int below(const char *path) {
    const char *root = getenv("KILL_ROOT");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static void tick(const char *what) {
    static ssize_t (*real)(int, const void *, size_t);
    const char *at = getenv("KILL_AT"), *log = getenv("KILL_LOG");
    int number = atomic_fetch_add(&seen, 1) + 1;
    if (at && atoi(at) == number) kill(getpid(), SIGKILL);
    if (at && atoi(at) == 0 && log) {
        char line[64];
        if (!real) real = dlsym(RTLD_NEXT, "write");
        int fd = open(log, O_WRONLY | O_APPEND | O_CREAT, 0644);
        real(fd, line, (size_t)snprintf(line, sizeof line, "%s\n", what));
        close(fd);
    }
}

#define AROUND(name, type, mine, parameters, arguments)                       \
    type name parameters {                                                    \
        static type(*real) parameters;                                        \
        if (!real) real = dlsym(RTLD_NEXT, #name);                            \
        int ours = mine;                                                      \
        if (ours) tick(#name);                                                \
        type result = real arguments;                                         \
        if (ours) tick(#name);                                                \
        return result;                                                        \
    }

AROUND(write, ssize_t, fd_below(fd), (int fd, const void *data, size_t size), (fd, data, size))
AROUND(pwrite64, ssize_t, fd_below(fd), (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
AROUND(fsync, int, fd_below(fd), (int fd), (fd))
AROUND(ftruncate64, int, fd_below(fd), (int fd, off_t size), (fd, size))
AROUND(posix_fallocate64, int, fd_below(fd), (int fd, off_t at, off_t size), (fd, at, size))
AROUND(mkdir, int, below(path), (const char *path, mode_t mode), (path, mode))
/* names below the root are given with an open directory */
AROUND(renameat, int, fd_below(at), (int at, const char *from, int there, const char *to), (at, from, there, to))
AROUND(linkat, int, fd_below(at), (int at, const char *from, int there, const char *to, int flags),
       (at, from, there, to, flags))
AROUND(unlinkat, int, fd_below(at), (int at, const char *name, int flags), (at, name, flags))
AROUND(mkdirat, int, fd_below(at), (int at, const char *name, mode_t mode), (at, name, mode))

int openat64(int at, const char *name, int flags, ...) {
    static int (*real)(int, const char *, int, ...);
    if (!real) real = dlsym(RTLD_NEXT, "openat64");
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0;
    va_end(list);
    int ours = (flags & O_CREAT) && fd_below(at);
    if (ours) tick("openat64");
    int fd = real(at, name, flags, mode);
    if (ours) tick("openat64");
    return fd;
}
