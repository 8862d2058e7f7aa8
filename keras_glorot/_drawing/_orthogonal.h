/* Random orthogonal matrices as orthogonal.py has the contract of them; for _native.c.

   A matrix is a product of reflections, WIDTH of which are applied together, to PANEL
   columns at a time, of which CHUNK rows stay in the first-level cache. */

enum { WIDTH = 32, PANEL = 64, CHUNK = 128 };

/* One tall matrix. */
typedef struct {
    uint32_t key[2];
    uint64_t first; /* Philox block of its first element */
    size_t rows, columns;
    float *vectors; /* for each block of reflections, its rows of WIDTH */
    double *sums;   /* for each block, products of its vectors, WIDTH x WIDTH, and signs */
} Product;

/* Where it goes to: rows and columns of it, scaled and rounded. */
typedef struct {
    char *out;
    Dtype dtype;
    double scale;
    int transposed;
    size_t rows[2], columns[2];
} Place;

enum { SUMS = WIDTH * WIDTH + WIDTH };

/* c += a b, over `count` terms in ascending order: a tile that stays in registers. */
typedef void Multiply(double *c, size_t c_row, const double *a, size_t a_row, size_t a_step,
                      const double *b, size_t b_step, size_t count);

typedef struct {
    Multiply *multiply;
    size_t height, width; /* of the tile */
} Tile;

#define TILE(SET, TARGET, LANES, HIGH, ACROSS)                                             \
    enum { HEIGHT##SET = HIGH, WIDTH##SET = (ACROSS) * sizeof(LANES) / sizeof(double) };   \
    TARGET static void multiply##SET(double *c, size_t c_row, const double *a,             \
                                     size_t a_row, size_t a_step, const double *b,         \
                                     size_t b_step, size_t count) {                        \
        LANES sum[HIGH][ACROSS];                                                           \
        for (int i = 0; i < HIGH; i++)                                                     \
            for (int j = 0; j < ACROSS; j++) sum[i][j] = ((LANES *)(c + i * c_row))[j];    \
        for (size_t k = 0; k < count; k++, a += a_step, b += b_step)                       \
            for (int i = 0; i < HIGH; i++)                                                 \
                for (int j = 0; j < ACROSS; j++)                                           \
                    sum[i][j] += a[i * a_row] * ((const LANES *)b)[j];                     \
        for (int i = 0; i < HIGH; i++)                                                     \
            for (int j = 0; j < ACROSS; j++) ((LANES *)(c + i * c_row))[j] = sum[i][j];    \
    }

#ifdef X86
typedef double Lanes_v2 __attribute__((vector_size(16)));
typedef double Lanes_v3 __attribute__((vector_size(32)));
typedef double Lanes_v4 __attribute__((vector_size(64)));
TILE(_v2, V2, Lanes_v2, 4, 2)
TILE(_v3, V3, Lanes_v3, 4, 2)
TILE(_v4, V4, Lanes_v4, 8, 2)
#endif
#if defined(__GNUC__) && !defined(X86)
typedef double Lanes_plain __attribute__((vector_size(16)));
TILE(_plain, , Lanes_plain, 4, 4)
#else
TILE(_plain, , double, 2, 4)
#endif

/* Coefficients of orthogonal.py's contract, highest power first. */
static const double LOG[] = {2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3, 2.0};
static const double SINE[] = {-1.0 / 39916800, 1.0 / 362880, -1.0 / 5040, 1.0 / 120,
                              -1.0 / 6, 1.0};
static const double COSINE[] = {1.0 / 479001600, -1.0 / 3628800, 1.0 / 40320, -1.0 / 720,
                                1.0 / 24, -1.0 / 2, 1.0};
enum { LOG_TERMS = 6, SINE_TERMS = 6, COSINE_TERMS = 7 };
#define LN2 0x1.62e42fefa39efp-1
#define TURN 0x1.921fb54442d18p-30 /* pi / 2**31 */
#define ROOT2 0x1.6a09e667f3bcdp+0

/* Normal numbers in pairs, by Box and Muller. */
INLINE void make_normals(float *restrict out, const uint32_t *restrict words,
                         size_t count) {
    for (size_t i = 0; i < count / 2; i++) {
        uint32_t angle = words[2 * i + 1] | 1;
        double size = (double)(int32_t)(words[2 * i] ^ 0x80000000u) + 2147483648.5;
        uint64_t bits;
        memcpy(&bits, &size, sizeof bits);
        double exponent = (double)((int32_t)(bits >> 52) - 1023 - 32);
        bits = (bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
        double m;
        memcpy(&m, &bits, sizeof m);
        int large = m > ROOT2;
        m = large ? m * 0.5 : m;
        exponent = large ? exponent + 1 : exponent;
        double f = (m - 1) / (m + 1), z = f * f, log = LOG[0];
        for (int j = 1; j < LOG_TERMS; j++) log = log * z + LOG[j];
        log = exponent * LN2 + f * log;
        double radius = sqrt(-2 * log);

        uint32_t quarter = (angle + 0x20000000u) >> 30;
        double t = (double)(int32_t)(angle - (quarter << 30)) * TURN;
        double s = t * t, sine = SINE[0], cosine = COSINE[0];
        for (int j = 1; j < SINE_TERMS; j++) sine = sine * s + SINE[j];
        for (int j = 1; j < COSINE_TERMS; j++) cosine = cosine * s + COSINE[j];
        sine = sine * t;
        double x = quarter & 1 ? sine : cosine, y = quarter & 1 ? cosine : sine;
        x = (quarter + 1) & 2 ? -x : x;
        y = quarter & 2 ? -y : y;
        out[2 * i] = (float)(radius * x);
        out[2 * i + 1] = (float)(radius * y);
    }
}

INLINE float *vectors_of(const Product *p, size_t block) {
    /* Block b has `rows` - WIDTH b rows. */
    return p->vectors + WIDTH * (block * p->rows - WIDTH * (block * (block - 1) / 2));
}

INLINE size_t chunk_of(size_t rows, size_t done) {
    return rows - done < CHUNK ? rows - done : CHUNK;
}

INLINE void widen(double *restrict out, const float *restrict in, size_t count) {
    for (size_t i = 0; i < count; i++) out[i] = in[i];
}

INLINE void multiply_all(double *c, size_t c_row, const double *a, size_t a_row,
                         size_t a_step, const double *b, size_t b_step, size_t count,
                         size_t rows, size_t columns, const Tile *tile) {
    for (size_t i = 0; i < rows; i += tile->height)
        for (size_t j = 0; j < columns; j += tile->width)
            tile->multiply(c + i * c_row + j, c_row, a + i * a_row, a_row, a_step, b + j,
                           b_step, count);
}

/* The vectors of a block of reflections, and the sums of their products. */
INLINE void make_vectors(const Product *p, size_t block, MakeWords *make_words,
                         const Tile *tile) {
    ALIGNED uint64_t numbers[BATCH] = {0};
    ALIGNED uint32_t words[WORDS] = {0};
    ALIGNED float normals[WORDS];
    ALIGNED double squares[WIDTH] = {0}, products[WIDTH * WIDTH] = {0};
    ALIGNED double wide[CHUNK * WIDTH];
    const size_t top = block * WIDTH, rows = p->rows - top;
    const size_t count = p->columns - top < WIDTH ? p->columns - top : WIDTH;
    const size_t per_row = (count + 3) / 4, stride = (p->columns + 3) / 4;
    float *vectors = vectors_of(p, block);
    double *sums = p->sums + block * SUMS, *signs = sums + WIDTH * WIDTH;

    for (size_t row = 0; row < rows;) {
        size_t batch = BATCH / per_row < rows - row ? BATCH / per_row : rows - row;
        for (size_t i = 0; i < batch; i++)
            for (size_t j = 0; j < per_row; j++)
                numbers[i * per_row + j] =
                    p->first + (top + row + i) * stride + top / 4 + j;
        make_words(words, numbers, (batch * per_row + 15) / 16 * 16, p->key);
        make_normals(normals, words, 4 * batch * per_row);
        for (size_t i = 0; i < batch; i++, row++) {
            float *vector = vectors + row * WIDTH;
            size_t right = row + 1 < count ? row + 1 : count; /* of it, above the diagonal */
            memset(vector, 0, WIDTH * sizeof *vector);
            memcpy(vector, normals + 4 * i * per_row, right * sizeof *vector);
            for (int k = 0; k < WIDTH; k++) squares[k] += (double)vector[k] * vector[k];
        }
    }
    for (size_t k = 0; k < count; k++) {
        double first = vectors[k * WIDTH + k], length = sqrt(squares[k]);
        signs[k] = first < 0 ? 1 : -1;
        vectors[k * WIDTH + k] = (float)(first < 0 ? first - length : first + length);
    }
    for (size_t row = 0, chunk; row < rows; row += chunk) {
        chunk = chunk_of(rows, row);
        widen(wide, vectors + row * WIDTH, chunk * WIDTH);
        multiply_all(products, WIDTH, wide, 1, WIDTH, wide, WIDTH, chunk, WIDTH, WIDTH,
                     tile);
    }
    memcpy(sums, products, sizeof products);
}

/* In place: the products of the vectors with the columns, to the factors on the vectors. */
INLINE void solve(double *products, const double *sums, size_t count, size_t columns) {
    for (size_t k = count; k-- > 0;) {
        double *row = products + k * PANEL, factor = -2 / sums[k * WIDTH + k];
        for (size_t l = k + 1; l < count; l++) {
            const double *other = products + l * PANEL, sum = sums[k * WIDTH + l];
            for (size_t j = 0; j < columns; j++) row[j] += sum * other[j];
        }
        for (size_t j = 0; j < columns; j++) row[j] *= factor;
    }
}

INLINE void store(const Place *place, size_t index, const double *in, size_t count) {
    const size_t item = item_of(place->dtype);
    char *out = place->out + index * item;
    double values[CHUNK];
    float floats[CHUNK];
    uint16_t halves[CHUNK];
    for (size_t i = 0; i < count; i++) values[i] = in[i] * place->scale;
    for (size_t i = 0; i < count; i++) floats[i] = (float)values[i];
    if (place->dtype == FLOAT16) round_float16(halves, floats, count);
    if (place->dtype == BFLOAT16) round_bfloat16(halves, floats, count);
    memcpy(out, item == 8 ? (void *)values : item == 4 ? (void *)floats : (void *)halves,
           count * item);
}

INLINE void store_panel(const Place *place, const double *panel, size_t left) {
    size_t first = left > place->columns[0] ? left : place->columns[0];
    size_t last = left + PANEL < place->columns[1] ? left + PANEL : place->columns[1];
    const size_t top = place->rows[0], rows = place->rows[1] - top;
    const size_t columns = place->columns[1] - place->columns[0];
    if (!place->transposed) {
        for (size_t i = 0; i < rows; i++)
            store(place, i * columns + first - place->columns[0],
                  panel + (top + i) * PANEL + first - left, last - first);
        return;
    }
    double column[CHUNK];
    for (size_t row = 0, chunk; row < rows; row += chunk) {
        chunk = chunk_of(rows, row);
        for (size_t j = first; j < last; j++) {
            for (size_t i = 0; i < chunk; i++)
                column[i] = panel[(top + row + i) * PANEL + j - left];
            store(place, (j - place->columns[0]) * rows + row, column, chunk);
        }
    }
}

INLINE size_t up_to(size_t count, size_t step) { return (count + step - 1) / step * step; }

/* PANEL columns of the matrix: those of the identity, reflected. */
INLINE void make_panel(const Product *p, const Place *place, size_t left, double *panel,
                       const Tile *tile) {
    ALIGNED double products[WIDTH * PANEL], wide[CHUNK * WIDTH] = {0};
    const size_t right = p->columns - left < PANEL ? p->columns : left + PANEL;
    const size_t columns = up_to(right - left, tile->width);
    if (right <= place->columns[0] || left >= place->columns[1]) return;
    memset(panel, 0, p->rows * PANEL * sizeof *panel);
    for (size_t j = left; j < right; j++)
        panel[j * PANEL + j - left] = p->sums[j / WIDTH * SUMS + WIDTH * WIDTH + j % WIDTH];
    for (size_t block = (right - 1) / WIDTH + 1; block-- > 0;) {
        const size_t top = block * WIDTH, rows = p->rows - top;
        const size_t count = p->columns - top < WIDTH ? p->columns - top : WIDTH;
        const size_t vectors = up_to(count, tile->height);
        const float *source = vectors_of(p, block);
        memset(products, 0, vectors * PANEL * sizeof *products);
        for (size_t row = 0, chunk; row < rows; row += chunk) {
            chunk = chunk_of(rows, row);
            widen(wide, source + row * WIDTH, chunk * WIDTH);
            multiply_all(products, PANEL, wide, 1, WIDTH, panel + (top + row) * PANEL,
                         PANEL, chunk, vectors, columns, tile);
        }
        solve(products, p->sums + block * SUMS, count, columns);
        for (size_t row = 0, chunk; row < rows; row += chunk) {
            chunk = chunk_of(rows, row);
            if (rows > CHUNK) widen(wide, source + row * WIDTH, chunk * WIDTH);
            /* Whole tiles: the panel has rows to spare below. */
            multiply_all(panel + (top + row) * PANEL, PANEL, wide, WIDTH, 1, products,
                         PANEL, count, chunk, columns, tile);
        }
    }
    store_panel(place, panel, left);
}

typedef enum { VECTORS_OF_BLOCKS, PANELS, MATRICES } Phase;

INLINE size_t blocks_of(const Product *p) { return up_to(p->columns, WIDTH) / WIDTH; }

/* In bytes: all vectors of a matrix, all sums, and a panel of one thread. */
INLINE size_t vectors_size(const Product *p) {
    return (size_t)(vectors_of(p, blocks_of(p)) - p->vectors) * sizeof(float);
}
INLINE size_t sums_size(const Product *p) { return blocks_of(p) * SUMS * sizeof(double); }
INLINE size_t panel_size(const Product *p) {
    return up_to(p->rows + 8, 8) * PANEL * sizeof(double); /* a tile may stand out below */
}

/* Memory that one thread needs: a panel, or all that a matrix is made from. */
INLINE size_t work_size(const Product *p, Phase phase) {
    if (phase == VECTORS_OF_BLOCKS) return 64;
    return 64 + panel_size(p) + (phase == MATRICES ? vectors_size(p) + sums_size(p) : 0);
}

static int are_large_enough(const Product *p, const Place *place, Phase phase, size_t last,
                            size_t out, size_t vectors, size_t sums) {
    const size_t item = item_of(place->dtype);
    size_t area = (place->rows[1] - place->rows[0]) * (place->columns[1] - place->columns[0]);
    if (phase == MATRICES) return out / item / (p->rows * p->columns) >= last;
    size_t count = phase == PANELS ? up_to(p->columns, PANEL) / PANEL : blocks_of(p);
    return out / item >= area && vectors >= vectors_size(p) && sums >= sums_size(p)
           && last <= count;
}

/* One phase, for blocks, panels or matrices from `first` to `last`. */
INLINE void multiply_job(Product p, Place place, Phase phase, size_t first, size_t last,
                         char *work, MakeWords *make_words, const Tile *tile) {
    const size_t matrix = p.rows * up_to(p.columns, 4) / 4;
    work += -(uintptr_t)work % 64;
    if (phase == VECTORS_OF_BLOCKS)
        for (size_t i = first; i < last; i++) make_vectors(&p, i, make_words, tile);
    if (phase == PANELS)
        for (size_t i = first; i < last; i++)
            make_panel(&p, &place, i * PANEL, (double *)work, tile);
    if (phase == MATRICES) {
        const size_t item = item_of(place.dtype);
        char *out = place.out;
        double *panel = (double *)work;
        p.sums = (double *)((char *)panel + panel_size(&p));
        p.vectors = (float *)((char *)p.sums + sums_size(&p));
        uint64_t start = p.first;
        for (size_t i = first; i < last; i++) {
            p.first = start + i * matrix;
            place.out = out + i * p.rows * p.columns * item;
            for (size_t j = 0; j < blocks_of(&p); j++) make_vectors(&p, j, make_words, tile);
            for (size_t j = 0; j < p.columns; j += PANEL)
                make_panel(&p, &place, j, panel, tile);
        }
    }
}

#define MULTIPLY(SET, TARGET, WORDS_SET)                                                   \
    TARGET static void multiply_job##SET(const Product *p, const Place *place,             \
                                         Phase phase, size_t first, size_t last,           \
                                         char *work) {                                     \
        const Tile tile = {multiply##SET, HEIGHT##SET, WIDTH##SET};                        \
        multiply_job(*p, *place, phase, first, last, work, WORDS_SET, &tile);              \
    }

#ifdef X86
MULTIPLY(_v2, V2, make_words_v2)
MULTIPLY(_v3, V3, make_words_v3)
MULTIPLY(_v4, V4, make_words_v4)
#endif
MULTIPLY(_plain, , make_words)
