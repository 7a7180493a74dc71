/* Preloaded: poll() without a time limit first sleeps, in the main thread, and no signal interrupts that. So a signal
   comes where it is easily lost: after the interpreter last looked for one, before the kernel waits. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int poll(struct pollfd *entries, nfds_t count, int milliseconds)
{
    int (*next)(struct pollfd *, nfds_t, int) = (int (*)(struct pollfd *, nfds_t, int))dlsym(RTLD_NEXT, "poll");
    struct timespec left = {0, 300000000};

    if (milliseconds < 0 && getpid() == syscall(SYS_gettid))
        while (nanosleep(&left, &left))
            ;
    return next(entries, count, milliseconds);
}
