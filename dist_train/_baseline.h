/* The door of _baseline.c: a decoder for baseline JPEGs that works only where a crop needs it. */
#include <stddef.h>
#include <stdint.h>

#define BASELINE_PADDING 64 /* bytes that may be written past the end of a row of pixels */

typedef struct Baseline Baseline;

/* Whether this processor can: it needs AVX2 and BMI2. */
int baseline_works(void);

/* Memory and tables, kept from one picture to the next. NULL where it does not work, or without memory. */
Baseline *baseline_new(void);
void baseline_free(Baseline *);

/* Read the header up to the scan. Answers where the scan's bytes begin, or NULL for what libjpeg shall decode. */
const uint8_t *baseline_open(Baseline *, const uint8_t *jpeg, size_t size, int *height, int *width);

/* Get ready to give rows top..bottom, of them the pixels left..right, pixel_bytes (3 or 4) bytes each. 0: cannot, or
 * something else than the picture's end follows the scan. */
int baseline_start(Baseline *, int top, int bottom, int left, int right, int pixel_bytes);

/* The next rows, at most `wanted`. Answers how many; 0 for what libjpeg shall look at: damage, or sums that overflow. */
int baseline_read(Baseline *, unsigned char **rows, int wanted);
