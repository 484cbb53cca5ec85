/* A disk that fails when it is told to: stands between the relay and the C library (LD_PRELOAD; see disk.rs).
 *
 * FAULTY_DIR: what lies below is on that disk. FAULTY_HOW: a file that says how it fails: "sync N" (the next N syncs
 * fail with EIO), "write" (every write fails with EROFS), "slow N" (a sync takes N ms), "read N" (a read that may
 * wait takes N ms). No file: it works.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_on_disk(int fd) {
    char link[64], path[4096];
    const char *dir = getenv("FAULTY_DIR");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, sizeof path - 1);
    return dir && len > 0 && strncmp(path, dir, strlen(dir)) == 0;
}

/* The number after the word, if the file says the word; -1 otherwise. */
static long told(const char *word, char *text, size_t size) {
    const char *how = getenv("FAULTY_HOW");
    int fd = how ? (int)syscall(SYS_openat, AT_FDCWD, how, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return -1;
    ssize_t len = syscall(SYS_read, fd, text, size - 1);
    syscall(SYS_close, fd);
    text[len > 0 ? len : 0] = 0;
    return strncmp(text, word, strlen(word)) == 0 ? atol(text + strlen(word)) : -1;
}

static int sync_fails(int fd) {
    char text[64];
    if (!is_on_disk(fd)) return 0;
    long slow = told("slow", text, sizeof text);
    if (slow > 0) usleep((useconds_t)slow * 1000);
    long left = told("sync", text, sizeof text);
    if (left <= 0) return 0;
    int how = (int)syscall(SYS_openat, AT_FDCWD, getenv("FAULTY_HOW"), O_WRONLY | O_TRUNC | O_CLOEXEC);
    int len = snprintf(text, sizeof text, "sync %ld", left - 1);
    syscall(SYS_write, how, text, (size_t)len);
    syscall(SYS_close, how);
    errno = EIO;
    return 1;
}

#define SYNC(name) \
    int name(int fd) { \
        static int (*real)(int); \
        if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, #name); \
        return sync_fails(fd) ? -1 : real(fd); \
    }
SYNC(fsync)
SYNC(fdatasync)

#define PWRITE(name, offset_type) \
    ssize_t name(int fd, const void *bytes, size_t len, offset_type offset) { \
        static ssize_t (*real)(int, const void *, size_t, offset_type); \
        char text[64]; \
        if (!real) real = (ssize_t (*)(int, const void *, size_t, offset_type))dlsym(RTLD_NEXT, #name); \
        if (is_on_disk(fd) && told("write", text, sizeof text) >= 0) { \
            errno = EROFS; \
            return -1; \
        } \
        return real(fd, bytes, len, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define PREAD(name, offset_type) \
    ssize_t name(int fd, void *bytes, size_t len, offset_type offset) { \
        static ssize_t (*real)(int, void *, size_t, offset_type); \
        char text[64]; \
        if (!real) real = (ssize_t (*)(int, void *, size_t, offset_type))dlsym(RTLD_NEXT, #name); \
        long slow = is_on_disk(fd) ? told("read", text, sizeof text) : -1; \
        if (slow > 0) usleep((useconds_t)slow * 1000); \
        return real(fd, bytes, len, offset); \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)
