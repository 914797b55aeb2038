// The methods of NativeSearch (native.py). search.py and feedback.py say what is computed and why. This file computes
// it faster: 32 rows or groups ("lanes") at a time, with all their data in the first-level cache.
//
// Every array is C-contiguous float32 unless a comment says otherwise.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 32, RUN = 16, MAX_GROUP = 128, MAX_BLOCK = 128, PER_UNIT = 8, CELLS = 256 * PER_UNIT, N_LEVELS = 16 };

typedef float lanes[LANES] __attribute__((aligned(64)));
typedef int32_t codes[LANES];

// The tables of grid.Grid. level, index [2][CELLS]: the nearest level in each codebook. scales [n_scales].
// borders: those between neighbouring nonzero scales, padded with infinity to 2^depth - 1 entries.
typedef struct {
    const float *level;
    const uint8_t *index;
    const float *scales, *borders;
    int32_t n_scales, depth;
} grid;

#define EACH _Pragma("GCC ivdep") for (int l = 0; l < LANES; l++)

// Written as a comparison, which compilers turn into vector instructions. fmaxf has to treat NaN specially.
static inline float larger(float a, float b) { return a > b ? a : b; }

static inline int cell(float x) {
    const float at = larger(x * PER_UNIT + CELLS / 2, 0);
    return (int) (at < CELLS - 1 ? at : CELLS - 1);
}

// Finds the code of the nearest nonzero scale for each value.
static void scale_codes(const grid *g, const lanes value, codes code) {
    EACH code[l] = 0;
    for (int step = 1 << (g->depth - 1); step; step >>= 1) {
        EACH code[l] += g->borders[code[l] + step - 1] < value[l] ? step : 0;
    }
    EACH code[l] += 1;
}

// ---- search without feedback ----

typedef struct {
    codes code;
    lanes loss;
    int32_t selector[MAX_GROUP / RUN][LANES];
} pick;

// WeightedGroups.at_scale. Assigns levels to w [size], with error weights a, at the scales of `p->code`: selectors,
// loss, and the least-squares scales for this assignment.
static void at_scale(const grid *g, const lanes *restrict w, const lanes *restrict a, int size, pick *restrict p,
                     lanes least_squares) {
    lanes inverse, scale, product, square;
    EACH scale[l] = g->scales[p->code[l]];
    EACH inverse[l] = 1 / scale[l];
    EACH p->loss[l] = product[l] = square[l] = 0;
    for (int start = 0; start < size; start += RUN) {
        lanes sums[2][3];
        for (int b = 0; b < 2; b++) {
            const float *table = g->level + b * CELLS;
            lanes e, xv, vv;
            EACH e[l] = xv[l] = vv[l] = 0;
            for (int k = start; k < start + RUN; k++) EACH {
                const float x = w[k][l] * inverse[l];
                const float v = table[cell(x)];
                const float av = a[k][l] * v;
                e[l] += a[k][l] * (x - v) * (x - v);
                xv[l] += av * x;
                vv[l] += av * v;
            }
            memcpy(sums[b][0], e, sizeof e);
            memcpy(sums[b][1], xv, sizeof xv);
            memcpy(sums[b][2], vv, sizeof vv);
        }
        int32_t *selector = p->selector[start / RUN];
        EACH selector[l] = sums[1][0][l] < sums[0][0][l];
        EACH p->loss[l] += selector[l] ? sums[1][0][l] : sums[0][0][l];
        EACH product[l] += selector[l] ? sums[1][1][l] : sums[0][1][l];
        EACH square[l] += selector[l] ? sums[1][2][l] : sums[0][2][l];
    }
    EACH p->loss[l] *= scale[l] * scale[l];
    EACH least_squares[l] = scale[l] * product[l] / larger(square[l], FLT_MIN);
}

// Replaces in `p` the lanes in which `other` has less loss.
static void take_pick(pick *restrict p, const pick *restrict other, int size) {
    int32_t better[LANES];
    EACH better[l] = other->loss[l] < p->loss[l];
    EACH p->code[l] = better[l] ? other->code[l] : p->code[l];
    EACH p->loss[l] = better[l] ? other->loss[l] : p->loss[l];
    for (int r = 0; r < size / RUN; r++) {
        EACH p->selector[r][l] = better[l] ? other->selector[r][l] : p->selector[r][l];
    }
}

// Transposes `from` [width][size] to [size][LANES]. Absent lanes are zero.
static void transpose(const float *from, int size, int width, lanes *to) {
    for (int k = 0; k < size; k++) {
        for (int l = 0; l < width; l++) to[k][l] = from[l * size + k];
        for (int l = width; l < LANES; l++) to[k][l] = 0;
    }
}

// TorchSearch.search for one group in every lane.
static void search(const grid *g, const lanes *w, const lanes *a, int size, const float *starts, int n_starts,
                   pick *p) {
    lanes largest, value;
    memset(p, 0, sizeof *p);
    EACH largest[l] = 0;
    for (int k = 0; k < size; k++) EACH {
        largest[l] = larger(largest[l], fabsf(w[k][l]));
        p->loss[l] += a[k][l] * w[k][l] * w[k][l];
    }
    for (int s = 0; s < n_starts; s++) {
        pick other;
        EACH value[l] = largest[l] * starts[s];
        for (int refit = 0; refit < 2; refit++) {
            scale_codes(g, value, other.code);
            at_scale(g, w, a, size, &other, value);
            take_pick(p, &other, size);
        }
    }
}

// Finds the indices of the nearest levels at a pick, and x = w / scale.
static void indices(const grid *g, const lanes *w, const pick *p, int size, lanes *x, uint8_t (*index)[LANES]) {
    lanes inverse;
    EACH inverse[l] = p->code[l] ? 1 / g->scales[p->code[l]] : 0;
    for (int k = 0; k < size; k++) {
        EACH x[k][l] = w[k][l] * inverse[l];
        for (int l = 0; l < LANES; l++) index[k][l] = g->index[cell(x[k][l]) + p->selector[k / RUN][l] * CELLS];
    }
}

// Up to LANES groups, their error weights, what the search found for them, and x = w / scale.
typedef struct {
    lanes w[MAX_GROUP], a[MAX_GROUP], x[MAX_GROUP];
    pick found;
    uint8_t index[MAX_GROUP][LANES];
} groups;

static void search_groups(const grid *g, const float *w, const float *a, int size, int width, const float *starts,
                          int n_starts, groups *f) {
    transpose(w, size, width, f->w);
    transpose(a, size, width, f->a);
    search(g, f->w, f->a, size, starts, n_starts, &f->found);
    indices(g, f->w, &f->found, size, f->x, f->index);
}

// TorchSearch.search, and the indices of the nearest levels.
// w, a, index [n][size]; code, error [n]; selector [n][size / 16].
void aaac_search(const grid *g, int64_t n, int64_t size, const float *w, const float *a, const float *starts,
                 int64_t n_starts, int64_t *code, uint8_t *selector, float *error, uint8_t *index) {
#pragma omp parallel for
    for (int64_t first = 0; first < n; first += LANES) {
        const int width = n - first < LANES ? n - first : LANES;
        const int runs = size / RUN;
        groups f;
        search_groups(g, w + first * size, a + first * size, size, width, starts, n_starts, &f);
        for (int l = 0; l < width; l++) {
            code[first + l] = f.found.code[l];
            error[first + l] = f.found.loss[l];
            for (int r = 0; r < runs; r++) selector[(first + l) * runs + r] = f.found.selector[r][l];
            for (int k = 0; k < size; k++) index[(first + l) * size + k] = f.index[k][l];
        }
    }
}

// TorchSearch.decode. levels [2][n_levels]; index, out [n][size]; selector [n][size / 16]; code [n].
void aaac_decode(const grid *g, int64_t n, int64_t size, const float *levels, int64_t n_levels, const uint8_t *index,
                 const uint8_t *selector, const int32_t *code, float *out) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        const float scale = g->scales[code[i]];
        for (int64_t k = 0; k < size; k += RUN) {
            const float *book = levels + selector[(i * size + k) / RUN] * n_levels;
            for (int j = 0; j < RUN; j++) out[i * size + k + j] = scale * book[index[i * size + k + j]];
        }
    }
}

// TorchSearch.lloyd_sums: adds a s^2 x and a s^2 to sums [2][32], by codebook and index. The groups are cut into slices
// that do not depend on the number of threads, so neither do the sums.
void aaac_lloyd_sums(const grid *g, int64_t n, int64_t size, const float *w, const float *a, const float *starts,
                     int64_t n_starts, double *sums) {
    enum { SLICES = 16 };
    double parts[SLICES][2][2 * N_LEVELS];
    memset(parts, 0, sizeof parts);
    const int64_t step = (n + SLICES * LANES - 1) / (SLICES * LANES) * LANES;
#pragma omp parallel for schedule(dynamic)
    for (int slice = 0; slice < SLICES; slice++) {
        const int64_t stop = (slice + 1) * step < n ? (slice + 1) * step : n;
        for (int64_t first = slice * step; first < stop; first += LANES) {
            const int width = stop - first < LANES ? stop - first : LANES;
            groups f;
            search_groups(g, w + first * size, a + first * size, size, width, starts, n_starts, &f);
            for (int k = 0; k < size; k++) for (int l = 0; l < width; l++) {
                const float s = g->scales[f.found.code[l]];
                const float weight = f.a[k][l] * s * s;
                const int key = f.found.selector[k / RUN][l] * N_LEVELS + f.index[k][l];
                parts[slice][0][key] += weight * f.x[k][l];
                parts[slice][1][key] += weight;
            }
        }
    }
    for (int slice = 0; slice < SLICES; slice++) {
        for (int i = 0; i < 4 * N_LEVELS; i++) sums[i] += (&parts[slice][0][0])[i];
    }
}

// ---- feedback ----

// A way to encode one group in every lane (columns.Candidate). error is U^-T (target - q), loss the sum of its squares.
// Levels are not multiplied by the scale.
typedef struct {
    codes code;
    lanes level[MAX_GROUP], error[MAX_GROUP], loss;
    int32_t selector[MAX_GROUP / RUN][LANES];
} candidate;

// GroupSearch.try_codes for one code in every lane. Rounds `target` at the scales of `c->code`, with feedback inside
// the group by the upper triangle `u`, of row stride `ld`.
static void try_codes(const grid *g, const lanes *restrict target, int size, const float *restrict u, int ld,
                      candidate *restrict c) {
    lanes x[RUN], value[2][RUN], error[2][RUN], sum[2], factor;
    EACH factor[l] = 1 / g->scales[c->code[l]];
    EACH c->loss[l] = 0;
    for (int start = 0; start < size; start += RUN) {
        for (int j = 0; j < RUN; j++) {
            lanes at;
            EACH at[l] = target[start + j][l] * factor[l];
            for (int i = 0; i < start; i++) {
                const float s = u[i * ld + start + j];
                EACH at[l] -= s * c->error[i][l];
            }
            memcpy(x[j], at, sizeof at);
        }
        for (int b = 0; b < 2; b++) {
            const float *table = g->level + b * CELLS;
            lanes total;
            EACH total[l] = 0;
            for (int j = 0; j < RUN; j++) {
                const float *column = u + start * ld + start + j;
                const float inverse = 1 / column[j * ld];
                lanes at;
                memcpy(at, x[j], sizeof at);
                for (int i = 0; i < j; i++) {
                    const float s = column[i * ld];
                    EACH at[l] -= s * error[b][i][l];
                }
                EACH {
                    const float v = table[cell(at[l])];
                    const float e = (at[l] - v) * inverse;
                    value[b][j][l] = v;
                    error[b][j][l] = e;
                    total[l] += e * e;
                }
            }
            memcpy(sum[b], total, sizeof total);
        }
        int32_t *selector = c->selector[start / RUN];
        EACH selector[l] = sum[1][l] < sum[0][l];
        EACH c->loss[l] += selector[l] ? sum[1][l] : sum[0][l];
        for (int j = 0; j < RUN; j++) {
            EACH c->level[start + j][l] = selector[l] ? value[1][j][l] : value[0][j][l];
            EACH c->error[start + j][l] = selector[l] ? error[1][j][l] : error[0][j][l];
        }
    }
    EACH factor[l] = g->scales[c->code[l]];
    EACH c->loss[l] *= factor[l] * factor[l];
    for (int k = 0; k < size; k++) EACH c->error[k][l] *= factor[l];
}

// Replaces in `c` the lanes in which `other` has less than `margin` times the loss.
static void take(candidate *restrict c, const candidate *restrict other, int size, float margin) {
    int32_t better[LANES], any = 0;
    EACH better[l] = other->loss[l] < c->loss[l] * margin;
    EACH any |= better[l];
    if (!any) return;
    EACH c->code[l] = better[l] ? other->code[l] : c->code[l];
    EACH c->loss[l] = better[l] ? other->loss[l] : c->loss[l];
    for (int k = 0; k < size; k++) {
        EACH c->level[k][l] = better[l] ? other->level[k][l] : c->level[k][l];
        EACH c->error[k][l] = better[l] ? other->error[k][l] : c->error[k][l];
    }
    for (int r = 0; r < size / RUN; r++) {
        EACH c->selector[r][l] = better[l] ? other->selector[r][l] : c->selector[r][l];
    }
}

// Computes white = U^-T x by forward substitution.
static void whiten(const lanes *restrict x, int size, const float *restrict u, int ld, lanes *restrict white) {
    for (int k = 0; k < size; k++) {
        lanes at;
        memcpy(at, x[k], sizeof at);
        for (int i = 0; i < k; i++) {
            const float s = u[i * ld + k];
            EACH at[l] -= s * white[i][l];
        }
        const float inverse = 1 / u[k * ld + k];
        EACH white[k][l] = at[l] * inverse;
    }
}

// GroupSearch.best. Tries the starts, the least-squares scale for the best of them, its neighbours, and zero.
static void best(const grid *g, const lanes *target, int size, const float *u, int ld, const float *starts,
                 int n_starts, candidate *c) {
    candidate other;
    lanes white[MAX_GROUP], level[MAX_GROUP], value, product, square, nothing;
    lanes largest;
    EACH largest[l] = 0;
    for (int k = 0; k < size; k++) EACH largest[l] = larger(largest[l], fabsf(target[k][l]));
    EACH c->loss[l] = INFINITY;
    EACH c->code[l] = 1;
    for (int s = 0; s < n_starts; s++) {
        EACH value[l] = largest[l] * starts[s];
        scale_codes(g, value, other.code);
        try_codes(g, target, size, u, ld, &other);
        take(c, &other, size, 1);
    }
    whiten(target, size, u, ld, white);
    whiten(c->level, size, u, ld, level);
    EACH product[l] = square[l] = nothing[l] = 0;
    for (int k = 0; k < size; k++) {
        EACH product[l] += white[k][l] * level[k][l];
        EACH square[l] += level[k][l] * level[k][l];
        EACH nothing[l] += white[k][l] * white[k][l];
    }
    EACH value[l] = product[l] / larger(square[l], FLT_MIN);
    codes refined, found;
    scale_codes(g, value, refined);
    memcpy(found, c->code, sizeof found);
    for (int s = 0; s < 3; s++) {
        EACH {
            const int up = found[l] + 1 < g->n_scales ? found[l] + 1 : found[l];
            const int down = found[l] > 1 ? found[l] - 1 : 1;
            other.code[l] = s == 0 ? refined[l] : s == 1 ? up : down;
        }
        try_codes(g, target, size, u, ld, &other);
        take(c, &other, size, 1);
    }
    int32_t zero[LANES], any = 0;
    EACH zero[l] = nothing[l] <= c->loss[l];
    EACH any |= zero[l];
    if (any) {
        EACH c->code[l] = zero[l] ? 0 : c->code[l];
        EACH c->loss[l] = zero[l] ? nothing[l] : c->loss[l];
        for (int k = 0; k < size; k++) EACH c->error[k][l] = zero[l] ? white[k][l] : c->error[k][l];
    }
}

// Copies columns of an [n][stride] array to lanes. Absent lanes are zero.
static void load(const float *from, int64_t stride, int n, int width, lanes *to) {
    for (int k = 0; k < n; k++) {
        for (int l = 0; l < width; l++) to[k][l] = from[k * stride + l];
        for (int l = width; l < LANES; l++) to[k][l] = 0;
    }
}

// Copies lanes to columns of an [n][stride] array.
static void store(const lanes *from, int n, int width, float *to, int64_t stride) {
    for (int k = 0; k < n; k++) memcpy(to + k * stride, from[k], width * sizeof(float));
}

// TorchSearch._write for one group.
static void write_candidate(const grid *g, const candidate *c, int size, int width, int64_t stride, float *q,
                            float *level, uint8_t *selector, int64_t *code) {
    for (int l = 0; l < width; l++) code[l] = c->code[l];
    for (int r = 0; r < size / RUN; r++) {
        for (int l = 0; l < width; l++) selector[r * stride + l] = c->selector[r][l];
    }
    for (int k = 0; k < size; k++) {
        for (int l = 0; l < width; l++) q[k * stride + l] = g->scales[c->code[l]] * c->level[k][l];
    }
    store(c->level, size, width, level, stride);
}

// TorchSearch.feed_back for a block of `n` columns. w, q, level [n][rows]; selector [n / 16][rows];
// code [n / size][rows]. u: the upper triangle of the block, of row stride `ld`.
void aaac_feed_back(const grid *g, int64_t n, int64_t rows, int64_t size, const float *u, int64_t ld,
                    const float *starts, int64_t n_starts, const float *w, float *q, float *level, uint8_t *selector,
                    int64_t *code) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t row = 0; row < rows; row += LANES) {
        const int width = rows - row < LANES ? rows - row : LANES;
        lanes x[MAX_BLOCK], left[MAX_BLOCK];
        candidate c;
        load(w + row, rows, n, width, x);
        for (int k = 0; k < n; k += size) {
            for (int j = k; j < k + size; j++) for (int i = 0; i < k; i++) {
                const float s = u[i * ld + j];
                EACH x[j][l] -= s * left[i][l];
            }
            best(g, x + k, size, u + k * ld + k, ld, starts, n_starts, &c);
            memcpy(left + k, c.error, size * sizeof(lanes));
            write_candidate(g, &c, size, width, rows, q + k * rows + row, level + k * rows + row,
                            selector + k / RUN * rows + row, code + k / size * rows + row);
        }
    }
}

// TorchSearch.sweep for a block of `n` columns. gradient [n][rows]: H (w - q) at these columns, before the sweep.
// h: the block's part of H, of row stride `ld`. u [n / size][size][size]: (H_GG)^-1 = U^T U for each group G.
// q, level, selector and code as for aaac_feed_back, read and written.
void aaac_sweep(const grid *g, int64_t n, int64_t rows, int64_t size, const float *h, int64_t ld, const float *u,
                const float *gradient, float *q, float *level, uint8_t *selector, int64_t *code) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t row = 0; row < rows; row += LANES) {
        const int width = rows - row < LANES ? rows - row : LANES;
        lanes grad[MAX_BLOCK], target[MAX_GROUP], old[MAX_GROUP], change[MAX_BLOCK];
        candidate kept, found;
        load(gradient + row, rows, n, width, grad);
        for (int k = 0; k < n; k += size) {
            const float *root = u + k * size;
            for (int j = k; j < k + size; j++) for (int i = 0; i < k; i++) {
                const float s = h[j * ld + i];
                EACH grad[j][l] -= s * change[i][l];
            }
            load(q + k * rows + row, rows, size, width, old);
            load(level + k * rows + row, rows, size, width, kept.level);
            for (int l = 0; l < LANES; l++) kept.code[l] = l < width ? code[k / size * rows + row + l] : 1;
            for (int r = 0; r < size / RUN; r++) {
                const uint8_t *of_run = selector + (k / RUN + r) * rows + row;
                for (int l = 0; l < LANES; l++) kept.selector[r][l] = l < width ? of_run[l] : 0;
            }
            // U grad is the present error of the group. The weights of least error are q + H_GG^-1 grad, and
            // H_GG^-1 grad = U^T U grad.
            EACH kept.loss[l] = 0;
            for (int i = 0; i < size; i++) {
                lanes at;
                EACH at[l] = 0;
                for (int j = i; j < size; j++) {
                    const float s = root[i * size + j];
                    EACH at[l] += s * grad[k + j][l];
                }
                EACH kept.error[i][l] = at[l];
                EACH kept.loss[l] += at[l] * at[l];
            }
            for (int j = 0; j < size; j++) {
                lanes at;
                memcpy(at, old[j], sizeof at);
                for (int i = 0; i <= j; i++) {
                    const float s = root[i * size + j];
                    EACH at[l] += s * kept.error[i][l];
                }
                memcpy(target[j], at, sizeof at);
            }
            codes first;
            memcpy(first, kept.code, sizeof first);
            candidate least;
            for (int s = -2; s <= 2; s++) {
                EACH {
                    const int wanted = first[l] + s;
                    found.code[l] = wanted < 1 ? 1 : wanted >= g->n_scales ? g->n_scales - 1 : wanted;
                }
                try_codes(g, target, size, root, size, &found);
                if (s == -2) memcpy(&least, &found, sizeof least);
                else take(&least, &found, size, 1);
            }
            // Rounding in float32 must not let a group go back and forth.
            take(&kept, &least, size, 1 - 1e-5f);
            write_candidate(g, &kept, size, width, rows, q + k * rows + row, level + k * rows + row,
                            selector + k / RUN * rows + row, code + k / size * rows + row);
            for (int j = 0; j < size; j++) {
                EACH change[k + j][l] = g->scales[kept.code[l]] * kept.level[j][l] - old[j][l];
            }
        }
    }
}

// TorchSearch.round_to_steps for a run of `n` columns. w, level, error [n][rows]; step, offset, inverse [rows]. u: the
// upper triangle of the run, of row stride `ld`. table [CELLS]: the nearest levels.
void aaac_round_to_steps(int64_t n, int64_t rows, const float *u, int64_t ld, const float *table, const float *step,
                         const float *offset, const float *inverse, const float *w, int8_t *level, float *error) {
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t row = 0; row < rows; row += LANES) {
        const int width = rows - row < LANES ? rows - row : LANES;
        lanes x[MAX_GROUP], left[MAX_GROUP], one, shift, factor, value;
        load(w + row, rows, n, width, x);
        load(step + row, rows, 1, width, &one);
        load(offset + row, rows, 1, width, &shift);
        load(inverse + row, rows, 1, width, &factor);
        for (int k = 0; k < n; k++) {
            const float root = 1 / u[k * ld + k];
            for (int i = 0; i < k; i++) {
                const float s = u[i * ld + k];
                EACH x[k][l] -= s * left[i][l];
            }
            EACH value[l] = table[cell((x[k][l] + shift[l]) * factor[l])];
            EACH left[k][l] = (x[k][l] - (value[l] * one[l] - shift[l])) * root;
            for (int l = 0; l < width; l++) level[k * rows + row + l] = (int8_t) value[l];
        }
        store(left, n, width, error + row, rows);
    }
}
