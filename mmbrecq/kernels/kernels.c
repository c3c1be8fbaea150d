/* The arithmetic of an iteration on a CPU, each in one pass over memory; see native.py. Every function returns 0, or 1
   where the lengths of its arrays do not fit; then it has done nothing. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GLIBC__) && defined(__x86_64__)
/* glibc has it for vectors, and its header says so to -ffast-math alone, which would change more than that. */
#pragma omp declare simd notinbranch
extern float expf(float);
#endif

/* Below this many elements a second thread costs more than it gains. */
#define SERIAL 32768
/* Sums are of blocks of this size, whatever the number of threads: their last bit never changes. */
#define BLOCK 4096

struct array {
    int64_t count;
    void *data;
};

/* NaN propagates. */
static inline float clamped(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* The rectified sigmoid h = sigma * stretch + gamma, and the sigma where it is 0, 1/2 and 1. */
struct curve {
    float gamma, stretch, low, half, high;
};

/* x ** power of a normal x > 0, to some 1e-4 for powers up to 9: by polynomials for the binary logarithm on [1, 2] and
   its inverse on [0, 1], in a third of the time of expf(power * logf(x)). It is the pull of a regulariser, no more. */
static inline float roughly_pow(float x, float power) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const float exponent = (float)((bits >> 23) - 127);
    bits = (bits & 0x7fffff) | 0x3f800000;
    float m;
    memcpy(&m, &bits, sizeof m);
    const float logarithm = exponent - 2.79415368f
        + m * (5.06975632f + m * (-3.52021884f + m * (1.61017755f + m * (-0.40947559f + m * 0.04392863f))));
    const float y = clamped(power * logarithm, -126.0f, 127.0f), whole = floorf(y), f = y - whole;
    bits = ((int32_t)whole + 127) << 23;
    memcpy(&m, &bits, sizeof m);
    return m * (1.0000036f + f * (0.69296955f + f * (0.24162132f + f * (0.05171774f + f * 0.01368398f))));
}

static inline float sigmoid(float alpha, float low, float high) {
    return clamped(1.0f / (1.0f + expf(-alpha)), low, high);
}

/* The weight without its gain: from the lower integer to the upper one. */
static inline float soft(int16_t grid, float scale, float h) {
    return scale * ((grid >> 1) + (grid & 1) * h);
}

/* Whether an array has one element, or one for each row. */
static inline int fits(struct array x, int64_t rows) {
    return x.count == 1 || x.count == rows;
}

static inline float at(struct array x, int64_t row) {
    return ((const float *)x.data)[x.count == 1 ? 0 : row];
}

/* weight = soft(sigmoid(alpha)) * gain, row by row. The grid holds twice the lower of the two integers of a weight, plus
   1 where the upper one is another. */
int soft_weight(int64_t rows, struct array alphas, struct array grids, struct array scales, struct array gains,
                struct array weights, struct curve curve) {
    const int64_t count = alphas.count;
    if (rows < 1 || count % rows || grids.count != count || weights.count != count || !fits(scales, rows)
        || !fits(gains, rows))
        return 1;
    /* with a structure in it a loop does not become one of vectors */
    const float low = curve.low, high = curve.high, gamma = curve.gamma, stretch = curve.stretch;
    const int64_t columns = count / rows;
#pragma omp parallel for schedule(static) if (count > SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const float scale = at(scales, row), gain = at(gains, row);
        const float *restrict alpha = (const float *)alphas.data + row * columns;
        const int16_t *restrict grid = (const int16_t *)grids.data + row * columns;
        float *restrict weight = (float *)weights.data + row * columns;
#pragma omp simd
        for (int64_t i = 0; i < columns; i++)
            weight[i] = soft(grid[i], scale, gamma + stretch * sigmoid(alpha[i], low, high)) * gain;
    }
    return 0;
}

/* The gradient of alpha, with the regulariser's, into out; returns <grad, weight> of the weight without its gain.
   A branch in a loop would take its exponentials out of the vectors, so what is cut is multiplied by 0. */
static inline float rounding_block(int64_t count, const float *restrict alpha, const int16_t *restrict grid,
                                   const float *restrict grad, float *restrict out, float scale, float gain,
                                   struct curve curve, float power, float factor) {
    const float low = curve.low, half = curve.half, high = curve.high, gamma = curve.gamma, stretch = curve.stretch;
    const float stride = scale * stretch * gain;
    float sum = 0.0f;
    if (factor == 0.0f) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; i++) {
            const float s = sigmoid(alpha[i], low, high), g = grad[i] * stride * (grid[i] & 1);
            sum += grad[i] * soft(grid[i], scale, gamma + stretch * s);
            out[i] = g * s * (1.0f - s) * (float)((s > low) & (s < high));
        }
        return sum;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) {
        const float s = sigmoid(alpha[i], low, high), centred = s - half;
        const float regulariser = centred * roughly_pow(centred * centred + FLT_MIN, power);
        const float g = grad[i] * stride * (grid[i] & 1) + factor * regulariser;
        sum += grad[i] * soft(grid[i], scale, gamma + stretch * s);
        out[i] = g * s * (1.0f - s) * (float)((s > low) & (s < high));
    }
    return sum;
}

/* From grads, those of the weight: the gradient of alpha to outs, and that of the gain, row by row, to sums. */
int rounding_gradient(int64_t rows, struct array alphas, struct array grids, struct array scales, struct array gains,
                      struct array grads, struct array outs, struct array sums, struct curve curve, float power,
                      float factor) {
    const int64_t count = alphas.count;
    if (rows < 1 || count % rows || grids.count != count || grads.count != count || outs.count != count
        || sums.count != rows || !fits(scales, rows) || !fits(gains, rows))
        return 1;
    const int64_t columns = count / rows;
#pragma omp parallel for schedule(static) if (count > SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t end = (row + 1) * columns;
        float sum = 0.0f;
        for (int64_t i = row * columns; i < end; i += BLOCK) {
            const int64_t size = i + BLOCK < end ? BLOCK : end - i;
            sum += rounding_block(size, (const float *)alphas.data + i, (const int16_t *)grids.data + i,
                                  (const float *)grads.data + i, (float *)outs.data + i, at(scales, row), at(gains, row),
                                  curve, power, factor);
        }
        ((float *)sums.data)[row] = sum;
    }
    return 0;
}

/* out = clamp(round(y / scale), low, high) * scale of y = clamp(x, floor, ceiling); y itself where keep is there and 0. */
int fake_quantize(struct array xs, struct array keeps, struct array outs, float scale, float low, float high,
                  float floor, float ceiling) {
    const int64_t count = xs.count;
    const float *restrict x = xs.data;
    const uint8_t *restrict keep = keeps.data;
    float *restrict out = outs.data;
    if (outs.count != count || (keep && keeps.count != count))
        return 1;
    if (!keep) {
#pragma omp parallel for simd schedule(static) if (parallel : count > SERIAL)
        for (int64_t i = 0; i < count; i++)
            out[i] = clamped(rintf(clamped(x[i], floor, ceiling) / scale), low, high) * scale;
        return 0;
    }
#pragma omp parallel for simd schedule(static) if (parallel : count > SERIAL)
    for (int64_t i = 0; i < count; i++) {
        const float y = clamped(x[i], floor, ceiling);
        const float quantized = clamped(rintf(y / scale), low, high) * scale;
        out[i] = keep[i] ? quantized : y;
    }
    return 0;
}

/* grad_y = grad where low < y < high, or keep is there and 0, grad_x = grad_y where floor < x < ceiling, and both are
   else 0; <grad, out> - <grad_y, y> to the first sum. */
int fake_quantize_gradient(struct array grads, struct array xs, struct array outs, struct array keeps,
                           struct array grads_x, struct array blocks, float low, float high, float floor,
                           float ceiling) {
    const int64_t count = xs.count;
    const float *restrict grad = grads.data, *restrict x = xs.data, *restrict out = outs.data;
    const uint8_t *restrict keep = keeps.data;
    float *restrict grad_x = grads_x.data;
    double *restrict sums = blocks.data;
    if (grads.count != count || outs.count != count || grads_x.count != count || (keep && keeps.count != count)
        || blocks.count < 1 || blocks.count < (count + BLOCK - 1) / BLOCK)
        return 1;
#pragma omp parallel for schedule(static) if (count > SERIAL)
    for (int64_t block = 0; block < blocks.count; block++) {
        const int64_t start = block * BLOCK, end = start + BLOCK < count ? start + BLOCK : count;
        float sum = 0.0f;
        if (keep) {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < end; i++) {
                const float y = clamped(x[i], floor, ceiling);
                const float g = ((y > low) & (y < high)) | !keep[i] ? grad[i] : 0.0f;
                grad_x[i] = (x[i] > floor) & (x[i] < ceiling) ? g : 0.0f;
                sum += grad[i] * out[i] - g * y;
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < end; i++) {
                const float y = clamped(x[i], floor, ceiling);
                const float g = (y > low) & (y < high) ? grad[i] : 0.0f;
                grad_x[i] = (x[i] > floor) & (x[i] < ceiling) ? g : 0.0f;
                sum += grad[i] * out[i] - g * y;
            }
        }
        sums[block] = sum;
    }
    for (int64_t block = 1; block < blocks.count; block++)
        sums[0] += sums[block];
    return 0;
}

/* x = other where keep is 0. */
int mix(struct array xs, struct array others, struct array keeps) {
    const int64_t count = xs.count;
    const float *restrict other = others.data;
    const uint8_t *restrict keep = keeps.data;
    float *restrict x = xs.data;
    if (others.count != count || keeps.count != count)
        return 1;
#pragma omp parallel for simd schedule(static) if (parallel : count > SERIAL)
    for (int64_t i = 0; i < count; i++)
        x[i] = keep[i] ? x[i] : other[i];
    return 0;
}

/* A variable of Adam, its gradient and moments, and its learning rate over the correction of the mean. */
struct variable {
    struct array value, grad, mean, square;
    float rate;
};

/* A step of Adam (Kingma and Ba, ICLR 2015) for each variable that has a gradient. The decays come as 1 - beta1, beta2
   and 1 - beta2, which float would have with fewer digits; root is that of the correction of the square. */
int adam(int64_t count, const struct variable *variables, float rest_mean, float beta_square, float rest_square,
         float epsilon, float root) {
    for (int64_t i = 0; i < count; i++) {
        const struct variable v = variables[i];
        if (v.mean.count != v.value.count || v.square.count != v.value.count
            || (v.grad.data && v.grad.count != v.value.count))
            return 1;
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t size = variables[i].value.count;
        const float rate = variables[i].rate, *restrict grad = variables[i].grad.data;
        float *restrict value = variables[i].value.data, *restrict mean = variables[i].mean.data;
        float *restrict square = variables[i].square.data;
        if (!grad)
            continue;
#pragma omp parallel for simd schedule(static) if (parallel : size > SERIAL)
        for (int64_t j = 0; j < size; j++) {
            const float g = grad[j];
            mean[j] += rest_mean * (g - mean[j]);
            square[j] = beta_square * square[j] + rest_square * g * g;
            value[j] -= rate * mean[j] / (sqrtf(square[j]) / root + epsilon);
        }
    }
    return 0;
}
