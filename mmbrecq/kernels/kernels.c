/* The arithmetic of a training step on a CPU, each in one pass over memory; see native.py. */

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

/* What is not a number stays so. */
static inline float clamped(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* Of Adam (Kingma and Ba, ICLR 2015): the rate over the correction of the mean; the decay of the square, and 1
   less the decays, which float would have with fewer digits; the root of the square's correction. */
struct adam_step {
    float rate, rest_mean, beta_square, rest_square, epsilon, root;
};

static inline void adam_block(int64_t count, float *restrict value, const float *restrict grad, float *restrict mean,
                              float *restrict square, struct adam_step step) {
    const float rate = step.rate, rest_mean = step.rest_mean, beta_square = step.beta_square;
    const float rest_square = step.rest_square, epsilon = step.epsilon, root = step.root;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float g = grad[i];
        const float m = mean[i] + rest_mean * (g - mean[i]);
        const float v = beta_square * square[i] + rest_square * g * g;
        mean[i] = m;
        square[i] = v;
        value[i] -= rate * m / (sqrtf(v) / root + epsilon);
    }
}

/* A layer whose rounding is learned: rows of weights with a scale, or all with the same; one gain for a row, or for all.
   The grid holds twice the lower of the two integers of a weight, plus 1 where the upper one is another. */
struct rounding {
    int64_t rows, columns;
    float *alpha;
    const int16_t *grid;
    const float *scale;
    int64_t scale_step;
    const float *gain;
    int64_t gain_step;
    float *weight;
    const float *grad;
    float *out;
    float *mean, *square;
    float *gain_grad;
};

/* Of the rectified sigmoid h = sigma * stretch + gamma, and the sigma where it is 0, 1/2 and 1. */
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

/* weight = soft(sigmoid(alpha)) * gain of every layer. */
void soft_weights(int64_t count, const struct rounding *layers, struct curve curve) {
    /* with a structure in it a loop does not become one of vectors */
    const float low = curve.low, high = curve.high, gamma = curve.gamma, stretch = curve.stretch;
    for (int64_t layer = 0; layer < count; layer++) {
        const struct rounding l = layers[layer];
        const int64_t columns = l.columns;
#pragma omp parallel for schedule(static) if (l.rows * columns > SERIAL)
        for (int64_t row = 0; row < l.rows; row++) {
            const float scale = l.scale[row * l.scale_step], gain = l.gain[row * l.gain_step];
            const float *restrict alpha = l.alpha + row * columns;
            const int16_t *restrict grid = l.grid + row * columns;
            float *restrict weight = l.weight + row * columns;
#pragma omp simd
            for (int64_t i = 0; i < columns; i++)
                weight[i] = soft(grid[i], scale, gamma + stretch * sigmoid(alpha[i], low, high)) * gain;
        }
    }
}

/* The gradient of alpha, with the regulariser's, into out; returns <grad, weight> of the weight without its gain.
   A branch in a loop would take its exponentials out of the vectors, so what is cut is multiplied by 0. */
static inline float rounding_block(int64_t count, const float *restrict alpha, const int16_t *restrict grid,
                                   const float *restrict grad, float *restrict out, float scale, float gain,
                                   struct curve curve, float power, float factor) {
    /* with a structure in it a loop does not become one of vectors */
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

/* From grad, that of the weight: the gradient of alpha to out, or where there are moments the step that alpha takes by
   it; gain_grad, that of the gain, row by row. */
void rounding_gradients(int64_t count, const struct rounding *layers, struct curve curve, float power, float factor,
                        struct adam_step step) {
    for (int64_t layer = 0; layer < count; layer++) {
        const struct rounding l = layers[layer];
#pragma omp parallel for schedule(static) if (l.rows * l.columns > SERIAL)
        for (int64_t row = 0; row < l.rows; row++) {
            const float scale = l.scale[row * l.scale_step], gain = l.gain[row * l.gain_step];
            const int64_t end = (row + 1) * l.columns;
            float local[BLOCK], sum = 0.0f;
            for (int64_t i = row * l.columns; i < end; i += BLOCK) {
                const int64_t size = i + BLOCK < end ? BLOCK : end - i;
                float *out = l.mean ? local : l.out + i;
                sum += rounding_block(size, l.alpha + i, l.grid + i, l.grad + i, out, scale, gain, curve, power, factor);
                if (l.mean)
                    adam_block(size, l.alpha + i, local, l.mean + i, l.square + i, step);
            }
            l.gain_grad[row] = sum;
        }
    }
}

/* out = clamp(round(y / scale), low, high) * scale of y = clamp(x, floor, ceiling); y itself where keep is there and 0. */
void fake_quantize(int64_t count, const float *restrict x, const uint8_t *restrict keep, float *restrict out,
                   float scale, float low, float high, float floor, float ceiling) {
    if (!keep) {
#pragma omp parallel for simd schedule(static) if (parallel : count > SERIAL)
        for (int64_t i = 0; i < count; i++) {
            const float y = clamped(x[i], floor, ceiling);
            out[i] = clamped(rintf(y / scale), low, high) * scale;
        }
        return;
    }
#pragma omp parallel for simd schedule(static) if (parallel : count > SERIAL)
    for (int64_t i = 0; i < count; i++) {
        const float y = clamped(x[i], floor, ceiling);
        const float quantized = clamped(rintf(y / scale), low, high) * scale;
        out[i] = keep[i] ? quantized : y;
    }
}

/* grad_y = grad where low < y < high, or keep is there and 0, grad_x = grad_y where floor < x < ceiling, and both are
   else 0; returns <grad, out> - <grad_y, y>. */
double fake_quantize_gradient(int64_t count, const float *restrict grad, const float *restrict x,
                              const float *restrict out, const uint8_t *restrict keep, float *restrict grad_x,
                              double *restrict sums, float low, float high, float floor, float ceiling) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (count > SERIAL)
    for (int64_t block = 0; block < blocks; block++) {
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
    double total = 0.0;
    for (int64_t block = 0; block < blocks; block++)
        total += sums[block];
    return total;
}

/* x = other where keep is 0. */
void mix(int64_t count, float *restrict x, const float *restrict other, const uint8_t *restrict keep) {
#pragma omp parallel for simd schedule(static) if (parallel : count > SERIAL)
    for (int64_t i = 0; i < count; i++)
        x[i] = keep[i] ? x[i] : other[i];
}

/* A variable; it has no gradient where it took no part in a step. */
struct variable {
    int64_t count;
    float *value;
    const float *grad;
    float *mean, *square;
};

/* A step of Adam for each of some variables. */
void adam(int64_t count, const struct variable *variables, struct adam_step step) {
    for (int64_t i = 0; i < count; i++) {
        const struct variable v = variables[i];
        if (!v.grad)
            continue;
#pragma omp parallel for schedule(static) if (v.count > SERIAL)
        for (int64_t start = 0; start < v.count; start += BLOCK)
            adam_block(start + BLOCK < v.count ? BLOCK : v.count - start, v.value + start, v.grad + start,
                       v.mean + start, v.square + start, step);
    }
}
