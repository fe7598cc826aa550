/* Writes 4 KiB blocks at random places, one after the other, and says how long
 * they took.
 *
 * latency-writer DISK BYTES STOP
 *
 * Writes into the first BYTES of DISK until there is a file STOP, each durable
 * before the next begins. Prints a line: writes, longest and sum in nanoseconds.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now(void) {
    struct timespec at;
    if (clock_gettime(CLOCK_MONOTONIC, &at) != 0)
        die("clock");
    return (uint64_t)at.tv_sec * 1000000000 + (uint64_t)at.tv_nsec;
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    int disk = open(argv[1], O_WRONLY | O_DIRECT | O_SYNC);
    if (disk < 0)
        die(argv[1]);
    uint64_t blocks = strtoull(argv[2], NULL, 10) / BLOCK;
    uint64_t *block;
    if (posix_memalign((void **)&block, BLOCK, BLOCK) != 0)
        die("memory");

    uint64_t random = 0x9e3779b97f4a7c15, writes = 0, longest = 0, sum = 0;
    while (access(argv[3], F_OK) != 0) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        for (size_t i = 0; i < BLOCK / sizeof *block; i++)
            block[i] = random + i;
        uint64_t began = now();
        if (pwrite(disk, block, BLOCK, (off_t)(random % blocks * BLOCK)) != BLOCK)
            die("write");
        uint64_t took = now() - began;
        writes++;
        sum += took;
        if (took > longest)
            longest = took;
    }
    printf("%llu %llu %llu\n", (unsigned long long)writes, (unsigned long long)longest,
           (unsigned long long)sum);
    return 0;
}
