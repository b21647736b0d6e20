// A sparse 1x1 convolution in the style of XNNPACK: Elsen, Dukhan, Gale, Simonyan, "Fast Sparse
// ConvNets" (CVPR 2020). float32 planes [channels, pixels], weights as CSR by outputs. The pixels
// of a panel stay in registers while the non-zero inputs of one output are added to them; ReLU.
//
// XNNPACK itself has this for x86 in SSE alone (panels of 32 pixels, eight registers) and leaves it
// off where there is AVX. Here it has the vectors that the compiler's target has.

#include <stdint.h>

#if defined __AVX512F__
enum { LANES = 16 };
#elif defined __AVX__
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));

typedef struct {
  int64_t outputs, pixels;  // of a plane: a multiple of 16
  const int32_t *begins, *inputs;
  const float *values, *bias, *x;
  float* y;
} Conv;

static inline __attribute__((always_inline)) void panel(const Conv* c, int64_t begin, int64_t end,
                                                        int64_t at, const int width) {
  for (int64_t n = begin; n < end; n++) {
    Vec sums[width];
    for (int i = 0; i < width; i++) sums[i] = (Vec){} + c->bias[n];
    for (int32_t e = c->begins[n]; e < c->begins[n + 1]; e++) {
      const Vec* x = (const Vec*)(c->x + c->inputs[e] * c->pixels) + at;
      for (int i = 0; i < width; i++) sums[i] += c->values[e] * x[i];
    }
    Vec* y = (Vec*)(c->y + n * c->pixels) + at;
    for (int i = 0; i < width; i++) y[i] = (Vec)((Mask)sums[i] & (sums[i] > 0));
  }
}

static void any_panel(const Conv* c, int64_t begin, int64_t end, int64_t at, int64_t width) {
  switch (width) {
    case 1: panel(c, begin, end, at, 1); break;
    case 2: panel(c, begin, end, at, 2); break;
    case 3: panel(c, begin, end, at, 3); break;
    case 4: panel(c, begin, end, at, 4); break;
    case 5: panel(c, begin, end, at, 5); break;
    case 6: panel(c, begin, end, at, 6); break;
    case 7: panel(c, begin, end, at, 7); break;
    case 8: panel(c, begin, end, at, 8); break;
  }
}

// Panels of at most `widest` (up to 8) vectors, as even as they can be. Threads share the panels,
// or the outputs where there are few panels.
void convolve(const Conv* c, int64_t widest, int threads) {
  const int64_t vectors = c->pixels / LANES, panels = (vectors + widest - 1) / widest;
  const int64_t parts = panels < 4 * threads ? threads : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < panels * parts; job++) {
    const int64_t part = job / panels, p = job % panels;
    const int64_t at = p * vectors / panels, next = (p + 1) * vectors / panels;
    const int64_t begin = part * c->outputs / parts, end = (part + 1) * c->outputs / parts;
    any_panel(c, begin, end, at, next - at);
  }
}
