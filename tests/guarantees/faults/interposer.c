/* Faults at chosen calls, and a record of all of them. For LD_PRELOAD.
 *
 * The calls that change what is below one directory are counted and recorded, under one lock, so
 * that their order is that of the record. At call number `at` the process is killed, or the call
 * fails; of a write that is killed, half is written before.
 *
 *     interpose_arm(directory, record, at, action)   action: 0 kills, an errno fails that call,
 *                                                    -errno fails that call and all later ones
 *     interpose_only(kind)                           from now on, only calls of this kind count
 *     interpose_renames(like)                        1: names cannot be exchanged, as on NFS;
 *                                                    2: nor is anything renamed over another
 *                                                    thing, as on sshfs
 *     interpose_mark(text)                           a line of the program's own in the record
 *     interpose_count()                              how many calls there were
 *
 * A record is lines of fields separated by tabs, each write followed by its bytes:
 *
 *     mkdir PATH | create PATH | truncate PATH SIZE | write PATH OFFSET SIZE | fsync PATH
 *     rename PATH PATH | exchange PATH PATH | unlink PATH | rmdir PATH | mark TEXT
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char below[PATH_MAX];
static size_t below_length;
static int record = -1;
static long at, count;
static int action;
static char only[16];
static int renames;

#define REAL(name, ...) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name);

/* --- paths ------------------------------------------------------------------------------- */

static int is_below(const char *path) {
    return below_length && !strncmp(path, below, below_length) &&
           (path[below_length] == '/' || !path[below_length]);
}

static const char *of_descriptor(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return path;
}

static const char *at_directory(int directory, const char *name, char *path) {
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char start[PATH_MAX];
        if (directory != AT_FDCWD) of_descriptor(directory, start);
        else if (!getcwd(start, sizeof start)) start[0] = 0;
        if (strlen(start) + strlen(name) + 2 > PATH_MAX) abort();
        strcat(strcat(strcpy(path, start), "/"), name);
    }
    return path;
}

/* --- faults and the record ---------------------------------------------------------------- */

static ssize_t (*write_really)(int, const void *, size_t);
static ssize_t (*pwrite_really)(int, const void *, size_t, off_t);

static void put(const void *bytes, size_t size) {
    while (record >= 0 && size) {
        ssize_t n = write_really(record, bytes, size);
        if (n <= 0) abort();
        bytes = (const char *)bytes + n;
        size -= n;
    }
}

static void line(const char *format, ...) {
    char text[3 * PATH_MAX];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    put(text, n);
}

/* Whether the next call has to fail; does not return if the process has to be killed. */
static int fails(const char *kind, int fd, const void *bytes, size_t size, off_t offset) {
    if (only[0] && strcmp(only, kind)) return 0;
    count++;
    if (at && (count == at || (action < 0 && count > at))) {
        if (action == 0) {
            if (size > 1) pwrite_really(fd, bytes, size / 2, offset);
            kill(getpid(), SIGKILL);
            for (;;) pause();
        }
        errno = action < 0 ? -action : action;
        return 1;
    }
    return 0;
}

void interpose_arm(const char *directory, const char *file, long when, int what) {
    write_really = dlsym(RTLD_NEXT, "write");
    pwrite_really = dlsym(RTLD_NEXT, "pwrite");
    record = file[0] ? open(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    at = when;
    action = what;
    count = 0;
    snprintf(below, sizeof below, "%s", directory);
    below_length = strlen(below);
}

void interpose_only(const char *kind) { snprintf(only, sizeof only, "%s", kind); }

void interpose_renames(int like) { renames = like; }

void interpose_mark(const char *text) {
    pthread_mutex_lock(&mutex);
    line("mark\t%s\n", text);
    pthread_mutex_unlock(&mutex);
}

long interpose_count(void) { return count; }

/* Runs `call` as one counted call, and `done` if it succeeds; -1 where it has to fail. */
#define COUNTED(kind, call, done) \
    { \
        pthread_mutex_lock(&mutex); \
        long result = fails(kind, -1, 0, 0, 0) ? -1 : (call); \
        int error = errno; \
        if (result >= 0) { done; } \
        pthread_mutex_unlock(&mutex); \
        errno = error; \
        return result; \
    }

/* --- opening ------------------------------------------------------------------------------ */

static int opened(int (*real)(int, const char *, int, ...), int directory, const char *name,
                  int flags, mode_t mode) {
    char path[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) || !is_below(at_directory(directory, name, path)))
        return real(directory, name, flags, mode);
    int is_new = faccessat(directory, name, F_OK, 0) != 0;
    if (!is_new && !(flags & O_TRUNC)) return real(directory, name, flags, mode);
    COUNTED("create", real(directory, name, flags, mode),
            is_new ? line("create\t%s\n", path) : line("truncate\t%s\t0\n", path))
}

#define MODE(flags) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list arguments; \
        va_start(arguments, flags); \
        mode = va_arg(arguments, mode_t); \
        va_end(arguments); \
    }

static int (*openat_really(void))(int, const char *, int, ...) {
    REAL(openat)
    return real;
}

int open(const char *name, int flags, ...) {
    MODE(flags)
    return opened(openat_really(), AT_FDCWD, name, flags, mode);
}

int open64(const char *name, int flags, ...) {
    MODE(flags)
    return opened(openat_really(), AT_FDCWD, name, flags | O_LARGEFILE, mode);
}

int openat(int directory, const char *name, int flags, ...) {
    MODE(flags)
    return opened(openat_really(), directory, name, flags, mode);
}

int openat64(int directory, const char *name, int flags, ...) {
    MODE(flags)
    return opened(openat_really(), directory, name, flags | O_LARGEFILE, mode);
}

/* --- writing ------------------------------------------------------------------------------ */

#define WRITTEN(call, first, size, offset) \
    { \
        char path[PATH_MAX]; \
        if (!below_length || !is_below(of_descriptor(fd, path))) return call; \
        pthread_mutex_lock(&mutex); \
        off_t start = offset; \
        long result = fails("write", fd, first, size, start) ? -1 : (call); \
        int error = errno; \
        if (result > 0) { \
            line("write\t%s\t%ld\t%ld\n", path, (long)start, result); \
            RECORD_BYTES \
        } \
        pthread_mutex_unlock(&mutex); \
        errno = error; \
        return result; \
    }

#define RECORD_BYTES put(bytes, result);

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(write)
    WRITTEN(real(fd, bytes, size), bytes, size, lseek(fd, 0, SEEK_CUR))
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset) {
    REAL(pwrite)
    WRITTEN(real(fd, bytes, size, offset), bytes, size, offset)
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off_t offset) {
    return pwrite(fd, bytes, size, offset);
}

#undef RECORD_BYTES
#define RECORD_BYTES \
    long left = result; \
    for (int i = 0; left > 0; i++) { \
        long n = left < (long)parts[i].iov_len ? left : (long)parts[i].iov_len; \
        put(parts[i].iov_base, n); \
        left -= n; \
    }

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev)
    WRITTEN(real(fd, parts, n), parts[0].iov_base, parts[0].iov_len, lseek(fd, 0, SEEK_CUR))
}

ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t offset) {
    REAL(pwritev)
    WRITTEN(real(fd, parts, n, offset), parts[0].iov_base, parts[0].iov_len, offset)
}

ssize_t pwritev64(int fd, const struct iovec *parts, int n, off_t offset) {
    return pwritev(fd, parts, n, offset);
}

int ftruncate(int fd, off_t size) {
    REAL(ftruncate)
    char path[PATH_MAX];
    if (!below_length || !is_below(of_descriptor(fd, path))) return real(fd, size);
    COUNTED("truncate", real(fd, size), line("truncate\t%s\t%ld\n", path, (long)size))
}

int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

static int flushed(int (*real)(int), int fd) {
    char path[PATH_MAX];
    if (!below_length || !is_below(of_descriptor(fd, path))) return real(fd);
    COUNTED("fsync", real(fd), line("fsync\t%s\n", path))
}

int fsync(int fd) {
    REAL(fsync)
    return flushed(real, fd);
}

int fdatasync(int fd) {
    REAL(fdatasync)
    return flushed(real, fd);
}

/* What would change files unseen. The model of the disk would be wrong, so it must not happen. */

static void unseen(int fd, const char *what) {
    char path[PATH_MAX];
    if (below_length && is_below(of_descriptor(fd, path))) {
        fprintf(stderr, "%s of %s is not recorded\n", what, path);
        abort();
    }
}

ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range)
    unseen(out, "copy_file_range");
    return real(in, from, out, to, size, flags);
}

int linkat(int from, const char *old, int to, const char *new, int flags) {
    REAL(linkat)
    char path[PATH_MAX];
    if (is_below(at_directory(to, new, path))) abort();
    return real(from, old, to, new, flags);
}

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

/* --- names -------------------------------------------------------------------------------- */

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    REAL(renameat2)
    char one[PATH_MAX], other[PATH_MAX];
    at_directory(from, old, one);
    at_directory(to, new, other);
    if (!is_below(one) && !is_below(other)) return real(from, old, to, new, flags);
    if (renames && flags) {
        errno = EINVAL;
        return -1;
    }
    if (renames == 2 && !faccessat(to, new, F_OK, AT_SYMLINK_NOFOLLOW)) {
        errno = EPERM;
        return -1;
    }
    COUNTED("rename", real(from, old, to, new, flags),
            line("%s\t%s\t%s\n", flags & RENAME_EXCHANGE ? "exchange" : "rename", one, other))
}

int renameat(int from, const char *old, int to, const char *new) {
    return renameat2(from, old, to, new, 0);
}

int rename(const char *old, const char *new) {
    return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0);
}

int mkdirat(int directory, const char *name, mode_t mode) {
    REAL(mkdirat)
    char path[PATH_MAX];
    if (!is_below(at_directory(directory, name, path))) return real(directory, name, mode);
    COUNTED("mkdir", real(directory, name, mode), line("mkdir\t%s\n", path))
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int unlinkat(int directory, const char *name, int flags) {
    REAL(unlinkat)
    char path[PATH_MAX];
    if (!is_below(at_directory(directory, name, path))) return real(directory, name, flags);
    COUNTED("unlink", real(directory, name, flags),
            line("%s\t%s\n", flags & AT_REMOVEDIR ? "rmdir" : "unlink", path))
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }

int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
