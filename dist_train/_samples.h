/* Blocks of coefficients to samples, samples to pixels: what _baseline.c does to numbers, on AVX2.
 *
 * Equal to libjpeg-turbo's accurate integer transform, smooth ("fancy") chroma and colour conversion, bit for bit. The
 * transform is that of Loeffler, Ligtenberg and Moschytz (1989) with its sums multiplied out; JFIF 1.02 gives the colours.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint8_t limited(int value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

/* ---- Blocks to samples ----------------------------------------------------------------------------------------- */

static inline __m256i paired(__m128i a, __m128i b) {
    return _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
}

static inline __m256i weighed(__m256i pairs, int first, int second) {
    return _mm256_madd_epi16(pairs, _mm256_set1_epi32((int)((uint32_t)second << 16 | (first & 0xFFFF))));
}

/* Eight vectors of eight int16 -> the transform over the vectors, rounded by `bits`: eight of int32. */
static inline void transform(const __m128i in[8], __m256i out[8], int bits) {
    __m256i p04 = paired(in[0], in[4]), p26 = paired(in[2], in[6]), p13 = paired(in[1], in[3]), p57 = paired(in[5], in[7]);
    __m256i half = _mm256_set1_epi32(1 << (bits - 1));
    __m256i sum = _mm256_add_epi32(weighed(p04, 8192, 8192), half);
    __m256i difference = _mm256_add_epi32(weighed(p04, 8192, -8192), half);
    __m256i e3 = weighed(p26, 10703, 4433), e2 = weighed(p26, 4433, -10704);
    __m256i even[4] = {_mm256_add_epi32(sum, e3), _mm256_add_epi32(difference, e2), _mm256_sub_epi32(difference, e2),
                       _mm256_sub_epi32(sum, e3)};
    __m256i odd[4] = {
        _mm256_add_epi32(weighed(p13, 11363, 9633), weighed(p57, 6437, 2260)),
        _mm256_add_epi32(weighed(p13, 9633, -2259), weighed(p57, -11362, -6436)),
        _mm256_add_epi32(weighed(p13, 6437, -11362), weighed(p57, 2261, 9633)),
        _mm256_add_epi32(weighed(p13, 2260, -6436), weighed(p57, 9633, -11363)),
    };
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_srai_epi32(_mm256_add_epi32(even[i], odd[i]), bits);
        out[7 - i] = _mm256_srai_epi32(_mm256_sub_epi32(even[i], odd[i]), bits);
    }
}

enum { LARGEST_SUM = 5700 }; /* |coefficients| of a block up to which no 16-bit sum of libjpeg-turbo overflows */

/* (8, 8) coefficients, times their table -> samples in eight rows. 0 where they are too large. */
static inline int write_block(const int16_t *block, const int16_t *table, uint8_t *to, size_t pitch) {
    __m128i rows[8], halves[8];
    __m256i sums[8], q[4], total = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        __m256i two = _mm256_loadu_si256((const __m256i *)(block + 16 * i));
        __m256i factors = _mm256_loadu_si256((const __m256i *)(table + 16 * i));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_abs_epi16(two), factors));
        two = _mm256_mullo_epi16(two, factors);
        rows[2 * i] = _mm256_castsi256_si128(two);
        rows[2 * i + 1] = _mm256_extracti128_si256(two, 1);
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    sum = _mm_add_epi32(sum, _mm_srli_si128(sum, 8));
    if (_mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_srli_si128(sum, 4))) > LARGEST_SUM) return 0;
    transform(rows, sums, 11);
    for (int i = 0; i < 4; i++) { /* two rows in each, one a lane; then rows to columns */
        q[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(sums[2 * i], sums[2 * i + 1]), 0xD8);
        rows[2 * i] = _mm256_castsi256_si128(q[i]);
        rows[2 * i + 1] = _mm256_extracti128_si256(q[i], 1);
    }
    for (int i = 0; i < 4; i++) {
        halves[2 * i] = _mm_unpacklo_epi16(rows[i], rows[i + 4]);
        halves[2 * i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        rows[2 * i] = _mm_unpacklo_epi16(halves[i], halves[i + 4]);
        rows[2 * i + 1] = _mm_unpackhi_epi16(halves[i], halves[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        halves[2 * i] = _mm_unpacklo_epi16(rows[i], rows[i + 4]);
        halves[2 * i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + 4]);
    }
    transform(halves, sums, 18);
    for (int i = 0; i < 4; i++) q[i] = _mm256_packs_epi32(sums[2 * i], sums[2 * i + 1]);
    const __m256i turn = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i middle = _mm256_set1_epi8(-128);
    __m256i left = _mm256_shuffle_epi8(_mm256_packs_epi16(q[0], q[1]), turn);
    __m256i right = _mm256_shuffle_epi8(_mm256_packs_epi16(q[2], q[3]), turn);
    __m256i upper = _mm256_xor_si256(_mm256_unpacklo_epi32(left, right), middle); /* rows 0 1 | 4 5 */
    __m256i lower = _mm256_xor_si256(_mm256_unpackhi_epi32(left, right), middle); /* rows 2 3 | 6 7 */
    __m128i two[4] = {_mm256_castsi256_si128(upper), _mm256_castsi256_si128(lower), _mm256_extracti128_si256(upper, 1),
                      _mm256_extracti128_si256(lower, 1)};
    for (int i = 0; i < 4; i++) {
        _mm_storel_epi64((__m128i *)(to + 2 * i * pitch), two[i]);
        _mm_storel_epi64((__m128i *)(to + (2 * i + 1) * pitch), _mm_unpackhi_epi64(two[i], two[i]));
    }
    return 1;
}

/* The same for a block of nothing but a mean. */
static inline int write_flat_block(const int16_t *block, const int16_t *table, uint8_t *to, size_t pitch) {
    int dc = block[0] * table[0];
    for (int y = 0; y < 8; y++) memset(to + y * pitch, limited(((dc * 4 + 16) >> 5) + 128), 8);
    return dc <= LARGEST_SUM && dc >= -LARGEST_SUM;
}

/* ---- Samples to pixels ----------------------------------------------------------------------------------------- */

/* 16 samples summed over two rows, the nearer one three times. */
static inline __m256i summed(const uint8_t *near, const uint8_t *far) {
    __m256i own = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)near));
    __m256i other = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)far));
    return _mm256_add_epi16(_mm256_add_epi16(own, own), _mm256_add_epi16(own, other));
}

/* Twice as many samples as there are in a row, each three parts its own and one part its neighbour's, and likewise over rows; `far`
 * may be `near`. One more is read on either side; reads up to 16 past the end, writes up to 30. */
static inline void widen(const uint8_t *near, const uint8_t *far, int samples, int to_left, int to_right, uint8_t *to) {
    const __m256i round_left = _mm256_set1_epi16(to_left), round_right = _mm256_set1_epi16(to_right);
    for (int i = 0; i < samples; i += 16) {
        __m256i own = summed(near + i, far + i);
        __m256i left = summed(near + i - 1, far + i - 1), right = summed(near + i + 1, far + i + 1);
        own = _mm256_add_epi16(own, _mm256_add_epi16(own, own));
        left = _mm256_srli_epi16(_mm256_add_epi16(_mm256_add_epi16(own, left), round_left), 4);
        right = _mm256_srli_epi16(_mm256_add_epi16(_mm256_add_epi16(own, right), round_right), 4);
        _mm256_storeu_si256((__m256i *)(to + 2 * i), _mm256_or_si256(left, _mm256_slli_epi16(right, 8)));
    }
}

/* Brightness and chroma to `pixels` pixels of 3 bytes, one at a time. */
static inline void write_last_colours(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int pixels, uint8_t *to) {
    for (int i = 0; i < pixels; i++, to += 3) {
        int blue = cb[i] - 128, red = cr[i] - 128;
        to[0] = limited(y[i] + ((91881 * red + 32768) >> 16));
        to[1] = limited(y[i] + ((-22554 * blue - 46802 * red + 32768) >> 16));
        to[2] = limited(y[i] + ((116130 * blue + 32768) >> 16));
    }
}

static inline __m256i shares(__m256i low, __m256i high, int of_blue, int of_red) {
    const __m256i half = _mm256_set1_epi32(32768);
    return _mm256_packs_epi32(_mm256_srai_epi32(_mm256_add_epi32(weighed(low, of_blue, of_red), half), 16),
                              _mm256_srai_epi32(_mm256_add_epi32(weighed(high, of_blue, of_red), half), 16));
}

/* Brightness and chroma to `pixels` pixels of 3 bytes, or of 4 with a 0. 16 a turn; reads up to 15 samples past the end, and of
 * 4 bytes writes up to BASELINE_PADDING past it. */
static inline void write_colours(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int pixels, int bytes, uint8_t *to) {
    const __m128i three = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    int i = 0;
    for (; i < pixels && (bytes == 4 || i + 16 <= pixels); i += 16) {
        const __m256i middle = _mm256_set1_epi16(128);
        __m256i light = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(y + i)));
        __m256i blue = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cb + i))), middle);
        __m256i red = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cr + i))), middle);
        __m256i low = _mm256_unpacklo_epi16(blue, red), high = _mm256_unpackhi_epi16(blue, red);
        /* the shares that 16 bits do not hold, 91881, -46802 and 116130, less whole ones that are added by themselves */
        __m256i r = _mm256_add_epi16(_mm256_add_epi16(light, red), shares(low, high, 0, 26345));
        __m256i g = _mm256_add_epi16(_mm256_sub_epi16(light, red), shares(low, high, -22554, 18734));
        __m256i bl = _mm256_add_epi16(_mm256_add_epi16(light, _mm256_add_epi16(blue, blue)), shares(low, high, -14942, 0));
        __m256i rg = _mm256_unpacklo_epi8(_mm256_packus_epi16(r, r), _mm256_packus_epi16(g, g)); /* pixels 0-7 | 8-15 */
        __m256i bx = _mm256_unpacklo_epi8(_mm256_packus_epi16(bl, bl), _mm256_setzero_si256());
        __m256i first = _mm256_unpacklo_epi16(rg, bx), second = _mm256_unpackhi_epi16(rg, bx); /* 0-3 | 8-11, 4-7 | 12-15 */
        __m128i four[4] = {_mm256_castsi256_si128(first), _mm256_castsi256_si128(second),
                           _mm256_extracti128_si256(first, 1), _mm256_extracti128_si256(second, 1)};
        for (int k = 0; k < 4; k++) {
            uint8_t *place = to + (size_t)bytes * (i + 4 * k);
            if (bytes == 4) {
                _mm_storeu_si128((__m128i *)place, four[k]);
                continue;
            }
            __m128i packed = _mm_shuffle_epi8(four[k], three);
            if (k < 3) { /* what is too much is written over */
                _mm_storeu_si128((__m128i *)place, packed);
                continue;
            }
            int32_t last = _mm_extract_epi32(packed, 2);
            _mm_storel_epi64((__m128i *)place, packed);
            memcpy(place + 8, &last, 4);
        }
    }
    if (i < pixels) write_last_colours(y + i, cb + i, cr + i, pixels - i, to + 3 * (size_t)i);
}
