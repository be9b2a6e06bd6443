/* The words of order.py, many a call: the finaliser of splitmix64, and permutations keyed by it. */
#include <stddef.h>
#include <stdint.h>

enum { TOGETHER = 8, CHUNK = 64 }; /* a round waits for the one before: side by side, eight take little longer than one */

static inline uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

/* Half the bits of the next even power of two, the domain of a permutation of 0..size-1. */
static int half_bits(uint64_t size) {
    int half = 1;
    while (half < 32 && (size - 1) >> half >> half) half++;
    return half;
}

/* A Feistel network on each of the words. */
static void feistel(uint64_t word[TOGETHER], const int half[TOGETHER], const uint64_t key[TOGETHER], int rounds) {
    uint64_t left[TOGETHER], right[TOGETHER], low_bits[TOGETHER];
    for (int k = 0; k < TOGETHER; k++) {
        low_bits[k] = ((uint64_t)1 << half[k]) - 1;
        left[k] = word[k] >> half[k];
        right[k] = word[k] & low_bits[k];
    }
    for (int r = 0; r < rounds; r++)
        for (int k = 0; k < TOGETHER; k++) {
            uint64_t next = left[k] ^ (mix(right[k] ^ (key[k] + r * 0x9E3779B97F4A7C15)) & low_bits[k]);
            left[k] = right[k];
            right[k] = next;
        }
    for (int k = 0; k < TOGETHER; k++) word[k] = left[k] << half[k] | right[k];
}

/* Where the permutations of 0..size[i]-1 that key[i] names take place[i] < size[i]: walked until they land below size[i].
 * size_step, key_step: 0 where one stands for all, else 1. */
static void permute(const uint64_t *place, const uint64_t *size, int size_step, const uint64_t *key, int key_step, int rounds,
                    uint64_t *out, ptrdiff_t n) {
    for (ptrdiff_t first = 0; first < n; first += CHUNK) {
        ptrdiff_t todo[CHUNK];
        int count = n - first < CHUNK ? (int)(n - first) : CHUNK;
        for (int i = 0; i < count; i++) out[todo[i] = first + i] = place[first + i];
        while (count) {
            int left_over = 0;
            for (int i = 0; i < count; i += TOGETHER) {
                uint64_t word[TOGETHER], keys[TOGETHER];
                int half[TOGETHER];
                for (int k = 0; k < TOGETHER; k++) {
                    ptrdiff_t at = todo[i + k < count ? i + k : i];
                    word[k] = out[at];
                    keys[k] = key[at * key_step];
                    half[k] = k && !size_step ? half[0] : half_bits(size[at * size_step]);
                }
                feistel(word, half, keys, rounds);
                for (int k = 0; k < TOGETHER && i + k < count; k++) {
                    ptrdiff_t at = todo[i + k];
                    out[at] = word[k];
                    todo[left_over] = at;
                    left_over += word[k] >= size[at * size_step];
                }
            }
            count = left_over;
        }
    }
}
