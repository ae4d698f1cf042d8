/* Launching the kernels of a pack from C or C++: nothing but libcuda.so.1, which is opened at run time.
 *
 *   mom_pack *pack = mom_open("folder");                      // a CUDA context is current
 *   uint32_t units[3] = {batch, 0, 0};
 *   const mom_kernel *kernel = mom_find(pack, "decode_step_gated_delta.decode_state", units[0]);
 *   uint64_t pointers[] = {q, kv, ...};                       // device addresses, in the table's order
 *   if (!kernel || mom_launch(pack, kernel, units, pointers, NULL, stream)) puts(mom_error());
 *
 * One thread at a time may use a pack. Pointers are aligned to 16 bytes. */
#ifndef MOM_LAUNCH_H
#define MOM_LAUNCH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { MOM_POINTER = 0, MOM_INT32 = 1, MOM_FLOAT32 = 2 } mom_kind;

/* base + sum of per_unit[i] * units[i], + times * ceil(each * units[unit] / per) where per is not 0; of that the number
 * of binary digits where digits is not 0 */
typedef struct {
    int64_t base, per_unit[3], times, each;
    uint32_t per, unit, digits;
} mom_formula;

typedef struct {
    const char *name;
    const char *type;    /* Triton's: *bf16, *fp32, *i64, i32, fp32 ... */
    mom_kind kind;
    mom_formula amount;  /* bytes behind a pointer, or the value of a whole number, as the operator passes it */
    float real;          /* the value of a float */
} mom_argument;

/* A kernel with overlap may begin before the one ahead of it on its stream ends (programmatic dependent launch) and waits
 * for that one by itself (griddepcontrol.wait); launched in the ordinary way it gives the same, later. Until it has waited
 * it reads weights, which nothing directly ahead of it may write, and decode_combine all its inputs but y, the only one
 * that decode_state writes: that kernel stands directly ahead of it, as mom_run launches them. */
typedef struct {
    const char *name;      /* function.kernel */
    const char *symbol;    /* entry point in the file */
    const char *cubin, *ptx;
    const char *constants; /* compiled in */
    uint32_t architecture; /* compute capability times ten */
    uint32_t smallest, largest; /* range of units[0] */
    mom_formula grid[3];
    uint32_t threads, shared_bytes;
    uint32_t overlap; /* 1: launch it with CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, from 90 on; else 0 */
    uint32_t num_arguments, num_hidden; /* hidden: pointers after the arguments, zero */
    const mom_argument *arguments;
} mom_kernel;

/* A function is an operator: one or more kernels, named function.kernel. */
typedef struct {
    const char *name;
    const char *computes; /* the operator of torch.ops.mom */
    const char *units[3]; /* the names of its open sizes, then NULL */
} mom_function;

typedef union {
    int32_t whole;
    float real;
} mom_scalar;

typedef struct mom_pack mom_pack;

/* The folder of the library or program that mom_launch.cpp is part of. */
const char *mom_folder(void);

/* The kernels of mom_kernels.h whose files lie in folder, for the device of the current context. NULL on an error. */
mom_pack *mom_open(const char *folder);
void mom_close(mom_pack *pack);

/* Makes the primary context of a device current, for programs without a CUDA context. 0 on success. */
int mom_use_device(int device);

/* The device of the current context, -1 where there is none. */
int mom_device(void);

/* The kernel of that name for this device and first size; NULL where there is none. */
const mom_kernel *mom_find(mom_pack *pack, const char *name, uint32_t first_unit);

int64_t mom_value(const mom_formula *formula, const uint32_t units[3]);
uint32_t mom_programs(const mom_kernel *kernel, int axis, const uint32_t units[3]);
int64_t mom_amount(const mom_argument *argument, const uint32_t units[3]);

/* Asynchronous. pointers: one device address per pointer argument, in order. scalars: one value per other argument, in
 * order, or NULL for those of the table (contiguous tensors, one token). stream: a CUstream or cudaStream_t. 0 on
 * success. */
int mom_launch(mom_pack *pack, const mom_kernel *kernel, const uint32_t units[3], const uint64_t *pointers,
               const mom_scalar *scalars, void *stream);

/* A buffer of a function, by the name of the arguments that it is passed as. */
typedef struct {
    const char *name;
    uint64_t pointer;
} mom_buffer;

/* A whole number to pass in place of the table's: a stride, where a buffer is part of a wider one. */
typedef struct {
    const char *name;
    int32_t value;
} mom_number;

/* All kernels of a function one after the other. A function of one size that is larger than its kernels take goes in
 * pieces, unless numbers are given. Asynchronous; 0 on success. */
int mom_run(mom_pack *pack, const char *function, const uint32_t units[3], const mom_buffer *buffers, uint32_t count,
            const mom_number *numbers, uint32_t num_numbers, void *stream);

/* Copies on the device, asynchronous. 0 on success. */
int mom_copy(uint64_t to, uint64_t from, uint64_t bytes, void *stream);

/* What went wrong last on this thread. */
const char *mom_error(void);

#ifdef __cplusplus
}
#endif
#endif
