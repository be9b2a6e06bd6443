/* Baseline JPEGs, as most photographs are, decoded only where a crop needs them; for processors with AVX2.
 *
 * libjpeg-turbo spends most of its time on a photograph on Huffman codes, and on a small picture on getting ready. Here
 * a coefficient takes one look into a table and no branch that chance decides, blocks beside the crop are only passed
 * over, and tables are kept while pictures repeat them. The pixels are libjpeg-turbo's, bit for bit: every sum is exact,
 * and rounded where it rounds. A picture with anything out of the ordinary (progressive, restarts, other samplings, a code
 * that does not exist, sums that 16 bits would not hold) is not decoded here but left to libjpeg, whose verdict counts.
 * On other processors libjpeg-turbo's own vectors are faster than this file without any.
 *
 * ITU-T T.81 (1992): markers in annex B, Huffman decoding in annex F.2.
 */
#include "_baseline.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h> /* before the line that turns the rest of this file into AVX2 */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi2")
#endif
#include "_samples.h"

#define INLINE __attribute__((always_inline)) static inline

enum { LOOK = 10, LONGEST = 16 };  /* bits of a code that a table is asked with; bits of the longest code */
enum { SPARE = 1024 };             /* zero bytes behind the scan: a block reads 65 times, up to 8 bytes on */
enum { WRONG = 0, DC_ONLY = 1, USUAL = 2 }; /* what a block is */
enum { END = 128 };                /* added to the place in the block by the code that ends it */

/* A coefficient: bits of its code and of code and value together, how far it moves on in the block, bits of its value. */
typedef struct {
    uint8_t code_bits, all_bits, moves, size;
} Entry;

typedef struct {
    uint8_t counts[LONGEST], symbols[256]; /* as the file gives them: what the tables were made from */
    int is_made, is_dc;
    Entry look[1 << LOOK]; /* by the next LOOK bits; code_bits 0 says that the code is longer */
    int32_t past[LONGEST + 1], offset[LONGEST + 1]; /* by length: first code that is too large; symbol of code 0 */
} Codes;

typedef struct {
    uint64_t bits; /* the next ones, from the highest */
    int count;     /* how many of them are known */
    const uint8_t *at;
} Bits;

typedef struct {
    int across, down; /* blocks in an MCU */
    int id, table, last_dc;
    Codes *dc, *ac;
    uint8_t *plane;   /* rows of the row of MCUs that was decoded last, the last row of the one before in front */
    size_t pitch;
} Component;

struct Baseline {
    Codes dc[2], ac[2];
    int has_dc[2], has_ac[2], has_table[4];
    int16_t tables[4][64]; /* quantisation, by place in the block */
    Component components[3];
    int num_components, height, width;
    const uint8_t *scan, *end;
    /* the rows that are wanted */
    int top, bottom, left, right, pixel_bytes;
    int first_mcu, last_mcu, next_row; /* columns of MCUs kept; the row of them to be decoded next */
    int row, ready;                    /* next row of pixels; rows before this one are decoded */
    Bits bits;
    const uint8_t *begin, *finish;     /* the scan's bytes, without stuffing */
    uint8_t *memory, *lines[2];        /* a row of either chroma component, as wide as the brightness */
    uint16_t *sums;
    size_t room;
};

#define ALL4(x) x, x, x, x
#define ALL16(x) ALL4(x), ALL4(x), ALL4(x), ALL4(x)
#define ALL(x) ALL16(x), ALL16(x), ALL16(x), ALL16(x)
static const uint8_t PLACES[1 + 64 + END] = { /* of the block's first, second ... coefficient in the file; 64: none */
    64, 0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55,
    62, 63, ALL(64), ALL(64),
};

/* ---- Header ---------------------------------------------------------------------------------------------------- */

static Entry entry_of(int length, int symbol) { /* of DC codes, `moves` has no meaning */
    int run = symbol >> 4, size = symbol & 15;
    return (Entry){length, length + size, size ? run + 1 : run == 15 ? 16 : END, size};
}

/* Make the tables of a DHT segment's counts and symbols. 0 where it is not a prefix code. */
static int make_codes(Codes *codes, const uint8_t *counts, const uint8_t *symbols, int num_symbols, int is_dc) {
    if (codes->is_made && codes->is_dc == is_dc && !memcmp(codes->counts, counts, LONGEST) &&
        !memcmp(codes->symbols, symbols, num_symbols))
        return 1;
    codes->is_made = 0;
    memcpy(codes->counts, counts, LONGEST);
    memcpy(codes->symbols, symbols, num_symbols);
    memset(codes->look, 0, sizeof(codes->look));
    int32_t code = 0, k = 0;
    for (int length = 1; length <= LONGEST; length++, code <<= 1) {
        codes->offset[length] = k - code;
        for (int i = 0; i < counts[length - 1]; i++, code++, k++) {
            if (code + 1 >= 1 << length || (is_dc && symbols[k] > 15)) return 0; /* all ones are no code */
            Entry entry = entry_of(length, symbols[k]);
            for (int spare = LOOK - length, rest = 0; spare >= 0 && rest < 1 << spare; rest++)
                codes->look[(code << spare) + rest] = entry;
        }
        codes->past[length] = code;
    }
    codes->is_dc = is_dc;
    return codes->is_made = 1;
}

static int read_codes(Baseline *b, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        int is_dc = !(*at >> 4), which = *at & 15, num_symbols = 0;
        if (*at >> 4 > 1 || which > 1 || end - at < 17) return 0;
        for (int i = 0; i < LONGEST; i++) num_symbols += at[1 + i];
        if (num_symbols > 256 || end - at < 17 + num_symbols) return 0;
        if (!make_codes((is_dc ? b->dc : b->ac) + which, at + 1, at + 17, num_symbols, is_dc)) return 0;
        (is_dc ? b->has_dc : b->has_ac)[which] = 1;
        at += 17 + num_symbols;
    }
    return 1;
}

static int read_tables(Baseline *b, const uint8_t *at, const uint8_t *end) {
    for (; at < end; at += 65) {
        if (*at > 3 || end - at < 65) return 0; /* 16 bits a value, or no such table */
        for (int i = 0; i < 64; i++) b->tables[*at][PLACES[1 + i]] = at[1 + i];
        b->has_table[*at] = 1;
    }
    return 1;
}

static int read_frame(Baseline *b, const uint8_t *at, size_t length) {
    int n = length >= 6 ? at[5] : 0;
    if (b->num_components || (n != 1 && n != 3) || length != 6 + 3 * (size_t)n || at[0] != 8) return 0;
    b->height = at[1] << 8 | at[2];
    b->width = at[3] << 8 | at[4];
    b->num_components = n;
    for (int i = 0; i < n; i++) {
        Component *c = &b->components[i];
        c->id = at[6 + 3 * i];
        c->across = at[7 + 3 * i] >> 4;
        c->down = at[7 + 3 * i] & 15;
        c->table = at[8 + 3 * i];
        if (c->table > 3 || c->across < 1 || c->across > 4 || c->down < 1 || c->down > 4) return 0;
    }
    Component *c = b->components;
    if (n == 1) c->across = c->down = 1; /* a single component is never interleaved, whatever it says */
    else if (c[1].across != 1 || c[1].down != 1 || c[2].across != 1 || c[2].down != 1) return 0;
    if (c->across > 2 || c->down > c->across) return 0;
    if (c->across == 2 && (b->width + 1) / 2 <= 2) return 0; /* too narrow to be smoothed */
    return b->height && b->width;
}

static int read_scan(Baseline *b, const uint8_t *at, size_t length) {
    int n = b->num_components;
    if (!n || length != 4 + 2 * (size_t)n || at[0] != n) return 0;
    for (int i = 0; i < n; i++) {
        Component *c = &b->components[i];
        int dc = at[2 + 2 * i] >> 4, ac = at[2 + 2 * i] & 15;
        if (at[1 + 2 * i] != c->id || dc > 1 || ac > 1 || !b->has_dc[dc] || !b->has_ac[ac] || !b->has_table[c->table])
            return 0;
        c->dc = &b->dc[dc];
        c->ac = &b->ac[ac];
    }
    at += 1 + 2 * n;
    return at[0] == 0 && at[1] == 63 && at[2] == 0;
}

const uint8_t *baseline_open(Baseline *b, const uint8_t *jpeg, size_t size, int *height, int *width) {
    const uint8_t *at = jpeg + 2, *end = jpeg + size;
    int is_jfif = 0, transform = -1;
    b->num_components = 0;
    memset(b->has_dc, 0, sizeof(b->has_dc));
    memset(b->has_ac, 0, sizeof(b->has_ac));
    memset(b->has_table, 0, sizeof(b->has_table));
    for (size_t length; end - at >= 4 && at[0] == 0xFF; at += 2 + length) {
        int marker = at[1], fits = 1;
        const uint8_t *body = at + 4;
        length = at[2] << 8 | at[3];
        if (length < 2 || (size_t)(end - at) < 2 + length) return NULL;
        if (marker == 0xE0) is_jfif |= length >= 16 && !memcmp(body, "JFIF", 5);
        else if (marker == 0xEE && length >= 14 && !memcmp(body, "Adobe", 5)) transform = body[11];
        else if (marker == 0xC4) fits = read_codes(b, body, at + 2 + length);
        else if (marker == 0xDB) fits = read_tables(b, body, at + 2 + length);
        else if (marker == 0xC0) fits = read_frame(b, body, length - 2);
        else if (marker == 0xDA) {
            if (!read_scan(b, body, length - 2)) return NULL;
            break;
        } else if ((marker & 0xF0) != 0xE0 && marker != 0xFE) return NULL;
        if (!fits) return NULL;
    }
    if (end - at < 4 || at[0] != 0xFF || at[1] != 0xDA) return NULL;
    Component *c = b->components;
    int is_usual = c[0].id == 1 && c[1].id == 2 && c[2].id == 3;
    if (b->num_components == 3 && !is_jfif && transform != 1 && !(transform < 0 && is_usual)) return NULL; /* maybe RGB */
    b->scan = at + 2 + (at[2] << 8 | at[3]);
    b->end = end;
    *height = b->height;
    *width = b->width;
    return b->scan;
}

/* ---- Codes to blocks ------------------------------------------------------------------------------------------- */

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

/* A code that no table holds, looked for by its length. Its bits are 0 where there is none. */
static Entry long_code(uint64_t bits, const Codes *codes) {
    for (int length = LOOK + 1; length <= LONGEST; length++) {
        int code = bits >> (64 - length);
        if (code < codes->past[length]) return entry_of(length, codes->symbols[(code + codes->offset[length]) & 255]);
    }
    return (Entry){0};
}

/* The value of an entry that the next bits begin with; a leading 0 stands for a negative one (T.81 F.2.2.1). There is no
 * branch: signs and sizes are chance, and a wrong guess costs as much as three coefficients. */
INLINE int value_of(Entry entry, uint64_t bits) {
    bits <<= entry.code_bits;
    int64_t is_negative = ~((int64_t)bits >> 63);
    return (int)(((bits ^ is_negative) >> 1 >> (63 - entry.size) ^ is_negative) - is_negative);
}

/* One block of a component, every coefficient in its place; is_kept 0: passed over, for what follows. Answers WRONG for a
 * code that does not exist or leaves the block, DC_ONLY where all other coefficients are 0, else USUAL. */
INLINE int read_block(Bits *bits, Component *c, int16_t *block, int is_kept) {
    Bits s = *bits;
    refill(&s);
    Entry entry = c->dc->look[s.bits >> (64 - LOOK)];
    if (!entry.code_bits && !(entry = long_code(s.bits, c->dc)).code_bits) return WRONG;
    c->last_dc += value_of(entry, s.bits);
    take(&s, entry.all_bits);
    if (c->last_dc > 32767 || c->last_dc < -32767) return WRONG;
    if (is_kept) {
        memset(block, 0, 64 * sizeof(int16_t));
        block[0] = c->last_dc;
    }
    const Entry *look = c->ac->look;
    int k = 1;
    while (k < 64) {
        if (s.count < 32) refill(&s);
        entry = look[s.bits >> (64 - LOOK)];
        if (!entry.code_bits && !(entry = long_code(s.bits, c->ac)).code_bits) return WRONG;
        k += entry.moves;
        if (is_kept) block[PLACES[k]] = value_of(entry, s.bits);
        take(&s, entry.all_bits);
    }
    *bits = s;
    if (k > 64 && k < 1 + END) return WRONG;
    return k == 1 + END ? DC_ONLY : USUAL;
}

static int num_mcus(const Baseline *b) { /* in a row of them */
    int pixels = 8 * b->components->across;
    return (b->width + pixels - 1) / pixels;
}

/* The first row of pixels of the MCUs that were decoded last. */
static int started(const Baseline *b) { return (b->next_row - 1) * 8 * b->components->down; }

/* The next row of MCUs: those of the columns kept into the planes, the others passed over. 0 where something is wrong. */
static int read_mcus(Baseline *b, int is_kept) {
    int until = is_kept && b->ready >= b->bottom ? b->last_mcu : num_mcus(b); /* nothing behind the last pixel is looked at */
    int16_t block[64 + 1]; /* and where zeros that belong nowhere go */
    for (int m = 0; m < until; m++) {
        int is_here = is_kept && m >= b->first_mcu && m < b->last_mcu;
        for (int i = 0; i < b->num_components; i++) {
            Component *c = &b->components[i];
            const int16_t *table = b->tables[c->table];
            for (int k = 0; k < c->across * c->down; k++) {
                int found = is_here ? read_block(&b->bits, c, block, 1) : read_block(&b->bits, c, block, 0);
                if (found == WRONG || 8 * (b->bits.at - b->begin) - b->bits.count > 8 * (b->finish - b->begin)) return 0;
                if (!is_here) continue;
                int x = (m - b->first_mcu) * c->across + k % c->across, y = k / c->across;
                uint8_t *to = c->plane + (1 + 8 * y) * c->pitch + 8 * x;
                if (!(found == DC_ONLY ? write_flat_block(block, table, to, c->pitch) : write_block(block, table, to, c->pitch)))
                    return 0;
            }
        }
    }
    return 1;
}

/* The row y of one chroma component as wide as the brightness, in the line; answers the sample of pixel `left`. */
static const uint8_t *chroma_row(const Baseline *b, const Component *c, int y, uint8_t *line) {
    const Component *brightness = b->components;
    const uint8_t *plane = c->plane - 8 * b->first_mcu; /* as if it began with the picture's first sample */
    if (brightness->across == 1) return plane + (1 + y - started(b)) * c->pitch + b->left;
    int begin = b->left / 2, end = (b->right + 1) / 2, width = (b->width + 1) / 2;
    int before = begin > 0 ? begin - 1 : 0, after = end < width ? end + 1 : width;
    uint16_t *sums = b->sums + 1 - begin; /* sums[begin - 1] is the first */
    const uint8_t *near, *far = NULL;
    if (brightness->down == 1) near = plane + (1 + y - started(b)) * c->pitch;
    else {
        int own = y / 2, other = y % 2 ? own + 1 : own - 1, height = (b->height + 1) / 2;
        if (other < 0 || other >= height) other = own;
        near = plane + (1 + own - started(b) / 2) * c->pitch;
        far = plane + (1 + other - started(b) / 2) * c->pitch;
    }
    sum_rows(near + before, far ? far + before : NULL, after - before, sums + before);
    if (begin == 0) sums[-1] = sums[0];
    if (end == width) sums[width] = sums[width - 1];
    if (far) widen(sums + begin, end - begin, 8, 7, 4, line);
    else widen(sums + begin, end - begin, 1, 2, 2, line);
    return line + b->left % 2;
}

static void write_row(const Baseline *b, int y, uint8_t *to) {
    const Component *c = b->components;
    const uint8_t *light = c->plane + (1 + y - started(b)) * c->pitch + b->left - 8 * c->across * b->first_mcu;
    const uint8_t *cb = b->lines[0], *cr = cb; /* of a grey picture: 128 throughout */
    if (b->num_components == 3) {
        cb = chroma_row(b, c + 1, y, b->lines[0]);
        cr = chroma_row(b, c + 2, y, b->lines[1]);
    }
    write_colours(light, cb, cr, b->right - b->left, b->pixel_bytes, to);
}

/* ---- The wanted rows ------------------------------------------------------------------------------------------- */

/* The scan's bytes up to its first marker, without the zeros stuffed behind 0xFF. */
static uint8_t *unstuff(const uint8_t *at, const uint8_t *end, uint8_t *to) {
    while (at < end) {
        const uint8_t *mark = memchr(at, 0xFF, end - at);
        size_t plain = (mark ? mark : end) - at;
        memcpy(to, at, plain);
        to += plain;
        if (!mark || mark + 1 >= end || mark[1]) break;
        *to++ = 0xFF;
        at = mark + 2;
    }
    return to;
}

int baseline_start(Baseline *b, int top, int bottom, int left, int right, int pixel_bytes) {
    Component *c = b->components;
    int across = c->across, mcus = num_mcus(b);
    b->top = b->row = b->ready = top;
    b->bottom = bottom;
    b->left = left;
    b->right = right;
    b->pixel_bytes = pixel_bytes;
    /* smoothing looks at a sample more on either side */
    b->first_mcu = (across == 1 ? left : left > 2 ? left - 2 : 0) / (8 * across);
    b->last_mcu = (right - 1 + (across == 1 ? 0 : 2)) / (8 * across) + 1;
    if (b->last_mcu > mcus) b->last_mcu = mcus;
    b->next_row = 0;
    size_t columns = 8 * (size_t)(b->last_mcu - b->first_mcu), scan = b->end - b->scan + SPARE, sizes[3], total = scan;
    for (int i = 0; i < b->num_components; i++) {
        c[i].pitch = columns * c[i].across + 32;
        total += sizes[i] = (8 * (size_t)c[i].down + 1) * c[i].pitch;
        c[i].last_dc = 0;
    }
    size_t line = right - left + 64;
    total += (line + 64) * sizeof(uint16_t) + 2 * line;
    if (b->room < total) {
        free(b->memory);
        b->room = 0;
        if (!(b->memory = malloc(total))) return 0;
        b->room = total;
    }
    b->sums = (uint16_t *)b->memory;
    b->lines[0] = b->memory + (line + 64) * sizeof(uint16_t);
    b->lines[1] = b->lines[0] + line;
    if (b->num_components == 1) memset(b->lines[0], 128, line);
    uint8_t *at = b->lines[1] + line;
    for (int i = 0; i < b->num_components; at += sizes[i++]) c[i].plane = at;
    b->begin = at;
    b->finish = unstuff(b->scan, b->end, at);
    memset((uint8_t *)b->finish, 0, SPARE);
    b->bits = (Bits){0, 0, b->begin};
    return 1;
}

/* Decode rows of MCUs until rows of pixels are ready. */
static int advance(Baseline *b) {
    Component *c = b->components;
    int rows = 8 * c->down, smooths = c->down == 2, first = b->top - smooths > 0 ? (b->top - smooths) / rows : 0;
    while (b->ready <= b->row) {
        int m = b->next_row++, is_last = (m + 1) * rows >= b->height, is_kept = m >= first;
        if (m * rows >= b->height) return 0;
        if (is_kept) { /* the last row needs the first chroma row of the MCUs below */
            for (int i = 0; i < b->num_components && m > first; i++)
                memcpy(c[i].plane, c[i].plane + 8 * c[i].down * c[i].pitch, c[i].pitch);
            int ready = is_last ? b->height : (m + 1) * rows - smooths;
            b->ready = ready > b->row ? ready : b->row;
        }
        if (!read_mcus(b, is_kept)) return 0;
    }
    return 1;
}

int baseline_read(Baseline *b, unsigned char **rows, int wanted) {
    if (b->ready <= b->row && !advance(b)) return 0;
    int until = b->ready < b->bottom ? b->ready : b->bottom, count = until - b->row < wanted ? until - b->row : wanted;
    for (int i = 0; i < count; i++) write_row(b, b->row++, rows[i]);
    return count;
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

Baseline *baseline_new(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") ? calloc(1, sizeof(Baseline)) : NULL;
}

void baseline_free(Baseline *b) {
    if (b) free(b->memory);
    free(b);
}

#else
Baseline *baseline_new(void) { return NULL; }
void baseline_free(Baseline *b) { (void)b; }
const uint8_t *baseline_open(Baseline *b, const uint8_t *jpeg, size_t size, int *height, int *width) { return NULL; }
int baseline_start(Baseline *b, int top, int bottom, int left, int right, int pixel_bytes) { return 0; }
int baseline_read(Baseline *b, unsigned char **rows, int wanted) { return 0; }
#endif
