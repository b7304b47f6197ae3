// The C ABI between libflowgrpo_native and flowgrpo_kernels/backends/native_library.py. Plain C types only.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Raised whenever a struct, a signature or the meaning of an argument changes; the loader refuses a
// library with another number.
#define FLOWGRPO_ABI 6

// dtype codes of FgTensor. Everything else that is floating is float32.
enum { FG_FLOAT32 = 0, FG_BFLOAT16 = 1, FG_FLOAT16 = 2 };

// [rows, elements]: elements of a row are contiguous, rows are row_stride elements apart (0 repeats
// one row). Any alignment. data = NULL stands for an absent tensor.
typedef struct {
  void* data;
  int64_t row_stride;
  int64_t dtype;
} FgTensor;

// One struct for every op; an op reads the fields it needs. Names and formulas are those of the
// numerical contract in flowgrpo_kernels/reference.py.
typedef struct {
  int64_t rows;
  int64_t elements;
  int64_t threads;
  const float* table;  // [table_rows, table_columns]
  int64_t table_rows;
  int64_t table_columns;
  const int64_t* step;   // [rows]; a step outside the table makes its row NaN
  const int64_t* seeds;  // [rows] or NULL
  FgTensor velocity;
  FgTensor uncond_velocity;
  FgTensor sample;
  FgTensor prev_sample;  // written by the step, read by the others
  FgTensor noise;
  FgTensor ref_velocity;
  FgTensor ref_uncond_velocity;
  FgTensor old_velocity;
  FgTensor x0;                    // what nft_loss compares with; the others write it, if present
  FgTensor mean;                  // written, or absent
  FgTensor grad_mean;             // read by log_prob_mean_backward, or absent
  FgTensor grad_x0;               // likewise
  FgTensor grad_velocity;         // written by the ops that give gradients
  FgTensor grad_uncond_velocity;  // likewise, or absent
  const float* old_log_prob;      // [rows]
  const float* advantages;        // [rows]
  const float* row_weight;        // [rows] or NULL
  const float* kl_row_weight;     // [rows] or NULL
  const float* sigma;             // [rows], nft_loss; as optimality NaN outside [0, 1]
  const float* optimality;        // [rows], nft_loss
  const float* grad;              // backward: [rows] for log_prob, [1] for the losses
  float* log_prob;                // [rows], written
  float* ratio;                   // [rows], written
  float* positive_error;          // [rows], written by nft_loss, as are the next two
  float* negative_error;
  float* old_deviation;
  float* coefs;                   // [rows, 3], written by a loss, read by its backward
  float* loss;                    // [1], written, as are the next five where the loss has them
  float* policy_loss;
  float* kl;
  float* clip_fraction;
  float* positive_loss;
  float* negative_loss;
  float guidance_scale;
  float uncond_scale;  // float32(1 - guidance_scale)
  float kl_weight;
  float ratio_low;   // float32(1 - clip_low)
  float ratio_high;  // float32(1 + clip_high)
  float adv_clip;
  float beta;   // nft_loss
  float floor;  // nft_loss: the least normaliser, > 0
} FgArgs;

// A compiled GPU kernel, and a launch of it on a grid of one dimension; the bytes of its parameters
// follow. Written by flowgrpo_kernels/backends/cuda_driver.py.
typedef struct {
  // cuLaunchKernel: function, grid, block, shared memory, stream, parameters, extra.
  int32_t (*launch)(void*, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t,
                    void*, void**, void**);
  void* function;
  uint64_t sixteenths;  // bit i: the i-th 32-bit word of the parameters must be a multiple of 16
  uint32_t threads;     // of a program
  uint32_t shared;      // bytes of shared memory
  uint32_t bytes;       // of the parameters
} FgKernel;

typedef struct {
  void* stream;
  uint64_t programs;
} FgLaunch;

enum { FG_MISALIGNED = -1 };

// Laws and flags of FgRows; their formulas are in flowgrpo_kernels/transition_rows.py.
enum { FG_FLOW_SDE, FG_DANCE_SDE, FG_CPS, FG_ODE, FG_PRECISE, FG_DANCE_PRECISE, FG_SIGMA_LINEAR };
enum { FG_GAUSSIAN = 1, FG_NORMALIZER = 2, FG_SCORE_QUIET = 4, FG_KL_GAUSSIAN = 8 };

// Rows of a transition table from sigma pairs; a stride of 0 repeats one value.
typedef struct {
  int64_t rows;
  int64_t law;
  int64_t flags;
  int64_t float64;    // bit i: the i-th of the next four is double, else float
  const void* sigma;
  const void* sigma_next;
  const void* noise_level;
  const void* sigma_max;
  const int64_t* noise_step;  // NULL: from sigma
  int64_t sigma_stride;
  int64_t sigma_next_stride;
  int64_t noise_level_stride;
  int64_t sigma_max_stride;
  int64_t noise_step_stride;
  double near_one;  // flow_sde: how far below 1 a sigma still is 1
  float* table;     // [rows, 10], written
} FgRows;

#ifdef __cplusplus
extern "C" {
#endif

int32_t flowgrpo_native_abi(void);
int64_t flowgrpo_native_args_size(void);
const char* flowgrpo_native_version(void);

// Instruction sets: 0 baseline, 1 AVX2, 2 AVX-512. isa_best() is the best that this library was
// built with and this CPU and system support; isa_select() returns the set now in use, which is the
// wanted one if it can be had.
int32_t flowgrpo_native_isa_best(void);
int32_t flowgrpo_native_isa_select(int32_t wanted);
// 1 if built with OpenMP, else every op runs on the calling thread.
int32_t flowgrpo_native_openmp(void);

// Ops return 0, or 1 when memory for partial sums could not be had.
int32_t flowgrpo_native_sde_step(const FgArgs*);
int32_t flowgrpo_native_log_prob(const FgArgs*);
int32_t flowgrpo_native_log_prob_backward(const FgArgs*);
// log_prob with mean and x0, and its backward.
int32_t flowgrpo_native_log_prob_mean(const FgArgs*);
int32_t flowgrpo_native_log_prob_mean_backward(const FgArgs*);
int32_t flowgrpo_native_grpo_loss_forward(const FgArgs*);
int32_t flowgrpo_native_grpo_loss_backward(const FgArgs*);
// Forward and backward in one pass over the memory, grad being known beforehand.
int32_t flowgrpo_native_grpo_loss_gradient(const FgArgs*);
// The same three of DiffusionNFT's loss.
int32_t flowgrpo_native_nft_loss_forward(const FgArgs*);
int32_t flowgrpo_native_nft_loss_backward(const FgArgs*);
int32_t flowgrpo_native_nft_loss_gradient(const FgArgs*);
// Normals of counter word noise_step into prev_sample.
int32_t flowgrpo_native_normals(const FgArgs*, uint32_t noise_step);
void flowgrpo_native_transition_rows(const FgRows*);
// Launches a kernel with the parameters behind an FgLaunch; returns what the driver does, a CUresult,
// or FG_MISALIGNED, and then nothing is launched.
int32_t flowgrpo_native_cuda_launch(const void* kernel, const void* launch);

#ifdef __cplusplus
}

// The ops of one instruction set.
struct Kernels {
  int32_t (*sde_step)(const FgArgs*);
  int32_t (*log_prob)(const FgArgs*);
  int32_t (*log_prob_backward)(const FgArgs*);
  int32_t (*log_prob_mean)(const FgArgs*);
  int32_t (*log_prob_mean_backward)(const FgArgs*);
  int32_t (*grpo_loss_forward)(const FgArgs*);
  int32_t (*grpo_loss_backward)(const FgArgs*);
  int32_t (*grpo_loss_gradient)(const FgArgs*);
  int32_t (*nft_loss_forward)(const FgArgs*);
  int32_t (*nft_loss_backward)(const FgArgs*);
  int32_t (*nft_loss_gradient)(const FgArgs*);
  int32_t (*normals)(const FgArgs*, uint32_t noise_step);
};
#endif
