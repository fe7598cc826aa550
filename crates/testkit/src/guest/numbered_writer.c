/* Writes numbered 4 KiB blocks, one after the other, as far as it is permitted.
 *
 * numbered-writer PORT SLOTS STRIDE DISK...
 *
 * Block n goes to disk n % disks, there to slot (n / disks) % SLOTS, at offset
 * slot * STRIDE, and holds the number n over and over. A line "N" from PORT
 * permits all blocks up to N; each completed write is answered by a line with
 * its number. No write begins before the one ahead of it is durable, so at any
 * point in time the disks hold exactly a prefix of the sequence.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK 4096

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* Reads on until a line with a higher number than `granted` has come. */
static uint64_t wait_for_permit(int port, uint64_t granted) {
    static char line[64];
    static size_t used;
    for (;;) {
        char *end;
        while ((end = memchr(line, '\n', used)) != NULL) {
            uint64_t number = strtoull(line, NULL, 10);
            used -= (size_t)(end + 1 - line);
            memmove(line, end + 1, used);
            if (number > granted)
                granted = number;
            else
                continue;
            if (memchr(line, '\n', used) == NULL)
                return granted;
        }
        ssize_t got = read(port, line + used, sizeof line - used);
        if (got < 0 && errno != EINTR)
            die("read permit");
        if (got > 0)
            used += (size_t)got;
        else
            usleep(1000); /* nobody is connected */
    }
}

int main(int argc, char **argv) {
    if (argc < 5)
        return 2;
    int port = open(argv[1], O_RDWR);
    if (port < 0)
        die(argv[1]);
    uint64_t slots = strtoull(argv[2], NULL, 10);
    uint64_t stride = strtoull(argv[3], NULL, 10);
    uint64_t disks = (uint64_t)(argc - 4);
    int *fds = calloc(disks, sizeof *fds);
    for (uint64_t i = 0; i < disks; i++) {
        fds[i] = open(argv[4 + i], O_WRONLY | O_DIRECT | O_SYNC);
        if (fds[i] < 0)
            die(argv[4 + i]);
    }
    uint64_t *block;
    if (posix_memalign((void **)&block, BLOCK, BLOCK) != 0)
        die("memory");

    uint64_t granted = 0;
    for (uint64_t n = 1;; n++) {
        while (n > granted)
            granted = wait_for_permit(port, granted);
        for (size_t i = 0; i < BLOCK / sizeof *block; i++)
            block[i] = n;
        off_t at = (off_t)((n / disks) % slots * stride);
        if (pwrite(fds[n % disks], block, BLOCK, at) != BLOCK)
            die("write");
        char ack[32];
        int len = snprintf(ack, sizeof ack, "%llu\n", (unsigned long long)n);
        if (write(port, ack, (size_t)len) != len)
            die("acknowledge");
    }
}
