/* Records what a process does to the files below a directory, in the order in which it does it, so that the test can
 * build what a power cut after any of these steps would have left. Loaded with LD_PRELOAD; see power/mod.rs.
 *
 * RECORD_DIR: the directory, absolute. RECORD_LOG: where the steps go. Syncs are only noted, not done.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES_MAX 65536
#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *dir;
static size_t dir_len;
static int log_fd = -1;
static struct { ino_t inode; dev_t device; uint32_t id; } files[FILES_MAX];
static uint32_t file_count;

__attribute__((constructor)) static void begin(void) {
    const char *log = getenv("RECORD_LOG");
    dir = getenv("RECORD_DIR");
    if (!dir || !log) return;
    dir_len = strlen(dir);
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_fd < 0) abort();
}

static int is_below(const char *path) { return log_fd >= 0 && path && strncmp(path, dir, dir_len) == 0; }

/* One record: kind, file, offset, length, bytes. */
static void note(char kind, uint32_t id, uint64_t offset, const void *bytes, uint32_t len) {
    char *record = malloc(17 + (size_t)len);
    if (!record) abort();
    record[0] = kind;
    memcpy(record + 1, &id, 4);
    memcpy(record + 5, &offset, 8);
    memcpy(record + 13, &len, 4);
    if (len) memcpy(record + 17, bytes, len);
    if (syscall(SYS_write, log_fd, record, 17 + (size_t)len) != (long)(17 + (size_t)len)) abort();
    free(record);
}

static void note_path(char kind, uint32_t id, const char *path) { note(kind, id, 0, path, (uint32_t)strlen(path)); }

static void note_paths(char kind, const char *from, const char *to) {
    char both[8192];
    int len = snprintf(both, sizeof both, "%s%c%s", from, '\n', to);
    note(kind, 0, 0, both, (uint32_t)len);
}

/* The newest file with the descriptor's inode: inodes are used again. */
static int64_t id_of(int fd, struct stat *status) {
    if (log_fd < 0 || fd == log_fd || fstat(fd, status) != 0 || !S_ISREG(status->st_mode)) return -1;
    for (uint32_t at = file_count; at-- > 0;)
        if (files[at].inode == status->st_ino && files[at].device == status->st_dev) return files[at].id;
    return -1;
}

static int opened(int fd, const char *path, int flags, int was_there) {
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) return fd;
    if (!was_there) {
        if (file_count == FILES_MAX) abort();
        files[file_count].inode = status.st_ino;
        files[file_count].device = status.st_dev;
        files[file_count].id = file_count;
        note_path('c', file_count++, path);
    } else if (flags & O_TRUNC) {
        int64_t id = id_of(fd, &status);
        if (id >= 0) note('t', (uint32_t)id, 0, NULL, 0);
    }
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        if (!is_below(path)) return real(path, flags, mode); \
        pthread_mutex_lock(&lock); \
        int was_there = access(path, F_OK) == 0; \
        int fd = opened(real(path, flags, mode), path, flags, was_there); \
        int error = errno; \
        pthread_mutex_unlock(&lock); \
        errno = error; \
        return fd; \
    }
OPEN(open)
OPEN(open64)

/* Does a step and notes it, as one. */
#define STEP(result_type, call, fd, noted) \
    struct stat status = {0}; \
    pthread_mutex_lock(&lock); \
    int64_t id = id_of(fd, &status); \
    result_type result = call; \
    int error = errno; \
    if (result >= 0 && id >= 0) noted; \
    pthread_mutex_unlock(&lock); \
    errno = error; \
    return result

#define PWRITE(name, offset_type) \
    ssize_t name(int fd, const void *bytes, size_t len, offset_type offset) { \
        REAL(name); \
        STEP(ssize_t, real(fd, bytes, len, offset), fd, note('w', (uint32_t)id, (uint64_t)offset, bytes, (uint32_t)result)); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *bytes, size_t len) {
    REAL(write);
    STEP(ssize_t, real(fd, bytes, len), fd,
         note('w', (uint32_t)id, (uint64_t)lseek(fd, 0, SEEK_CUR) - (uint64_t)result, bytes, (uint32_t)result));
}

#define TRUNCATE(name, offset_type) \
    int name(int fd, offset_type len) { \
        REAL(name); \
        STEP(int, real(fd, len), fd, note('t', (uint32_t)id, (uint64_t)len, NULL, 0)); \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

static int sync_noted(int fd) {
    struct stat status = {0};
    char link[64], path[4096];
    pthread_mutex_lock(&lock);
    int64_t id = id_of(fd, &status);
    if (id >= 0) {
        note('s', (uint32_t)id, 0, NULL, 0);
    } else if (log_fd >= 0 && S_ISDIR(status.st_mode)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t len = readlink(link, path, sizeof path - 1);
        if (len > 0) {
            path[len] = 0;
            if (is_below(path)) note_path('d', 0, path);
        }
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

int fsync(int fd) { return sync_noted(fd); }
int fdatasync(int fd) { return sync_noted(fd); }

#define PATH_STEP(call, path, noted) \
    pthread_mutex_lock(&lock); \
    int result = call; \
    int error = errno; \
    if (result == 0 && is_below(path)) noted; \
    pthread_mutex_unlock(&lock); \
    errno = error; \
    return result

int rename(const char *from, const char *to) {
    REAL(rename);
    PATH_STEP(real(from, to), from, note_paths('r', from, to));
}

int unlink(const char *path) {
    REAL(unlink);
    PATH_STEP(real(path), path, note_path('u', 0, path));
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    PATH_STEP(real(path, mode), path, note_path('k', 0, path));
}

/* How a directory is removed with what is in it. */
int unlinkat(int at, const char *name, int flags) {
    REAL(unlinkat);
    char link[64], path[8192];
    ssize_t len = 0;
    if (at != AT_FDCWD) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        len = readlink(link, path, 4096);
        if (len < 0) len = 0;
        path[len++] = '/';
    }
    snprintf(path + len, 4000, "%s", name);
    PATH_STEP(real(at, name, flags), path, if (!(flags & AT_REMOVEDIR)) note_path('u', 0, path));
}
