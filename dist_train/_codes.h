/* Huffman codes to blocks of coefficients: what _baseline.c does to bits, on AVX2 and BMI2.
 *
 * A look into a table gives two coefficients where both codes show in the next LOOK bits, as they mostly do: each look
 * waits for the one before to say where it begins. ITU-T T.81 (1992), annex F.2.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define INLINE __attribute__((always_inline)) static inline

enum { LOOK = 10, LONGEST = 16 }; /* bits of a code that a table is asked with; bits of the longest code */
enum { END = 128, MOST = 16 };    /* added to the place in the block by the code that ends it; by any other, at most */
enum { WRONG = 0, DC_ONLY = 1, USUAL = 2 }; /* what a block is */

/* A coefficient: bits of its code and of code and value together, how far it moves on in the block, and 63 less the bits of its
 * value, by which it is brought down. */
typedef struct {
    uint8_t code_bits, all_bits, moves, down;
} Entry;

/* Two coefficients, or one and a second that goes nowhere: it is written first and written over. */
typedef struct {
    Entry first;
    uint8_t all_bits, skipped_bits, moves, down; /* of both; before the second one's value; as above, of the second */
} Two;

typedef struct {
    uint8_t counts[LONGEST], symbols[256]; /* as the file gives them: what the tables were made from */
    int is_made, is_dc, is_repeated, is_paired;
    Two look[1 << LOOK]; /* by the next LOOK bits; code_bits 0 of the first says that the code is longer */
    int32_t past[LONGEST + 1], offset[LONGEST + 1]; /* by length: first code that is too large; symbol of code 0 */
} Codes;

typedef struct {
    uint64_t bits; /* the next ones, from the highest */
    int count;     /* how many of them are known */
    const uint8_t *at;
} Bits;

#define ALL4(x) x, x, x, x
#define ALL16(x) ALL4(x), ALL4(x), ALL4(x), ALL4(x)
#define ALL(x) ALL16(x), ALL16(x), ALL16(x), ALL16(x)
static const uint8_t PLACES[64 + MOST + END] = { /* of the block's first, second ... coefficient in the file; 64: none */
    64, 0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55,
    62, 63, ALL(64), ALL(64), ALL4(64), ALL4(64), ALL4(64), 64, 64, 64,
};

/* ---- Tables ---------------------------------------------------------------------------------------------------- */

static Entry entry_of(int length, int symbol) { /* of DC codes, `moves` has no meaning */
    int run = symbol >> 4, size = symbol & 15;
    return (Entry){length, length + size, size ? run + 1 : run == 15 ? MOST : END, 63 - size};
}

static const Entry NOTHING = {0, 0, 0, 63}, NO_CODE = {0, 0, 64 + 1, 63}; /* the latter leaves the block */

static Two two_of(Entry one, Entry next) {
    return (Two){one, one.all_bits + next.all_bits, one.all_bits + next.code_bits, next.moves, next.down};
}

/* Make pairs of single AC codes. It takes longer than a small picture, so it is done for tables that come again, or for a scan of
 * many bytes. */
static void pair(Codes *codes, size_t bytes) {
    if (codes->is_paired || !(codes->is_repeated || bytes > 4096)) return;
    codes->is_paired = 1;
    for (unsigned bits = 0; bits < 1 << LOOK; bits++) {
        Entry one = codes->look[bits].first, next = NOTHING;
        if (one.all_bits < LOOK && one.moves < END) next = codes->look[bits << one.all_bits & ((1 << LOOK) - 1)].first;
        if (next.code_bits && one.all_bits + next.code_bits <= LOOK) codes->look[bits] = two_of(one, next);
    }
}

/* Make the tables of a DHT segment's counts and symbols. 0 where it is not a prefix code. */
static int make_codes(Codes *codes, const uint8_t *counts, const uint8_t *symbols, int num_symbols, int is_dc) {
    if (codes->is_made && codes->is_dc == is_dc && !memcmp(codes->counts, counts, LONGEST) &&
        !memcmp(codes->symbols, symbols, num_symbols))
        return codes->is_repeated = 1;
    codes->is_made = codes->is_repeated = codes->is_paired = 0;
    memcpy(codes->counts, counts, LONGEST);
    memcpy(codes->symbols, symbols, num_symbols);
    memset(codes->look, 0, sizeof(codes->look));
    int32_t code = 0, k = 0;
    for (int length = 1; length <= LONGEST; length++, code <<= 1) {
        codes->offset[length] = k - code;
        for (int i = 0; i < counts[length - 1]; i++, code++, k++) {
            if (code + 1 >= 1 << length || (is_dc && symbols[k] > 15)) return 0; /* all ones are no code */
            Two entry = two_of(entry_of(length, symbols[k]), NOTHING);
            for (int spare = LOOK - length, rest = 0; spare >= 0 && rest < 1 << spare; rest++)
                codes->look[(code << spare) + rest] = entry;
        }
        codes->past[length] = code;
    }
    codes->is_dc = is_dc;
    return codes->is_made = 1;
}

/* ---- Blocks ---------------------------------------------------------------------------------------------------- */

INLINE void refill(Bits *s) { /* at least 56 bits are known then */
    uint64_t next;
    memcpy(&next, s->at, 8);
    s->bits |= __builtin_bswap64(next) >> s->count;
    s->at += (63 - s->count) >> 3;
    s->count |= 56;
}

INLINE void take(Bits *s, int n) {
    s->bits <<= n;
    s->count -= n;
}

/* A code that no table holds, looked for by its length; NO_CODE where there is none. */
static Entry long_code(uint64_t bits, const Codes *codes) {
    for (int length = LOOK + 1; length <= LONGEST; length++) {
        int code = bits >> (64 - length);
        if (code < codes->past[length]) return entry_of(length, codes->symbols[(code + codes->offset[length]) & 255]);
    }
    return NO_CODE;
}

/* The value that the bits begin with; a leading 0 stands for a negative one (T.81 F.2.2.1). There is no branch: signs and
 * sizes are chance, and a wrong guess costs as much as three coefficients. */
INLINE int value_of(uint64_t bits, int down) {
    int64_t is_negative = ~((int64_t)bits >> 63);
    return (int)(((bits ^ is_negative) >> 1 >> down ^ is_negative) - is_negative);
}

/* The next coefficients of a block, one or two, and the place behind them. Answers whether they are the last. 25 bits must be
 * known, and it takes no more, but for a long code. */
INLINE int read_two(Bits *s, const Codes *codes, int16_t *block, int is_kept, unsigned *place) {
    Two two = codes->look[s->bits >> (64 - LOOK)];
    if (UNLIKELY(!two.first.code_bits)) {
        refill(s);
        two = two_of(long_code(s->bits, codes), NOTHING);
    }
    unsigned first = *place + two.first.moves, second = first + two.moves;
    if (is_kept) {
        block[PLACES[second]] = value_of(s->bits << two.skipped_bits, two.down);
        block[PLACES[first]] = value_of(s->bits << two.first.code_bits, two.first.down);
    }
    *place = second;
    if (second < 64) {
        take(s, two.all_bits);
        return 0;
    }
    int is_full = first >= 64 && first < END; /* without a code that says so: the second is of the next block */
    if (is_full) *place = first;
    take(s, is_full ? two.first.all_bits : two.all_bits);
    return 1;
}

/* One block, every coefficient in its place; is_kept 0: passed over, for what follows. block: 64, and one for what belongs
 * nowhere. Answers WRONG for a code that does not exist or leaves the block, DC_ONLY where all other coefficients are 0, else
 * USUAL. */
INLINE int read_block(Bits *bits, const Codes *dc, const Codes *ac, int *last_dc, int16_t *block, int is_kept) {
    Bits s = *bits;
    refill(&s);
    Entry entry = dc->look[s.bits >> (64 - LOOK)].first;
    if (UNLIKELY(!entry.code_bits) && !(entry = long_code(s.bits, dc)).code_bits) return WRONG;
    *last_dc += value_of(s.bits << entry.code_bits, entry.down);
    take(&s, entry.all_bits);
    if (*last_dc > 32767 || *last_dc < -32767) return WRONG;
    if (is_kept) {
        for (int i = 0; i < 4; i++) _mm256_storeu_si256((__m256i *)(block + 16 * i), _mm256_setzero_si256());
        block[0] = *last_dc;
    }
    unsigned place = 1;
    if (!read_two(&s, ac, block, is_kept, &place))
        do refill(&s);
        while (!read_two(&s, ac, block, is_kept, &place) && !read_two(&s, ac, block, is_kept, &place));
    *bits = s;
    if (place > 64 && place < 1 + END) return WRONG;
    return place == 1 + END ? DC_ONLY : USUAL;
}
