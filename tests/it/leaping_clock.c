/* A wall clock that is ahead by so many seconds as the file CLOCK_AHEAD says: stands between the relay and the C library
 * (LD_PRELOAD; see clock.rs). No file: it is right.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, time);
    const char *ahead = getenv("CLOCK_AHEAD");
    if (result || clock != CLOCK_REALTIME || !ahead) return result;
    int file = (int)syscall(SYS_openat, AT_FDCWD, ahead, O_RDONLY | O_CLOEXEC);
    if (file < 0) return result;
    char text[32];
    ssize_t len = syscall(SYS_read, file, text, sizeof text - 1);
    syscall(SYS_close, file);
    text[len > 0 ? len : 0] = 0;
    time->tv_sec += atol(text);
    return result;
}
