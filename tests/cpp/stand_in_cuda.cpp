// A stand-in for libcuda.so.1 on a machine without a GPU: memory is the host's, copies are made, and a launch is a line
// "kernel x y z threads" in the file that STAND_IN_LOG names, with "overlap" behind it where the kernel may begin before the
// one ahead of it ends; a copy is a line "copy bytes". With -DOLD_DRIVER it is one that knows no overlap.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

void write(const char *line) {
    if (FILE *file = std::fopen(std::getenv("STAND_IN_LOG"), "a")) {
        std::fprintf(file, "%s\n", line);
        std::fclose(file);
    }
}

void write_launch(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, const char *more) {
    char line[256];
    std::snprintf(line, sizeof line, "%s %u %u %u %u%s", static_cast<const char *>(function), x, y, z, threads, more);
    write(line);
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }
int cuGetErrorString(int, const char **text) { return *text = "an error", 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = nullptr, 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) { return *value = attribute == 75 ? 9 : 0, 0; }
int cuModuleLoadData(void **module, const void *) { return *module = nullptr, 0; }
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(void **function, void *, const char *name) { return *function = strdup(name), 0; }
int cuFuncSetAttribute(void *, int, int) { return 0; }

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned, void *,
                   void **, void **) {
    return write_launch(function, x, y, z, threads, ""), 0;
}

#ifndef OLD_DRIVER
// CUlaunchConfig and CUlaunchAttribute of cuda.h
struct Attribute {
    int id;
    char padding[4];
    int value[16];
};
struct Config {
    unsigned x, y, z, threads, threads_y, threads_z, shared;
    void *stream;
    Attribute *attributes;
    unsigned count;
};

int cuLaunchKernelEx(const Config *config, void *function, void **, void **) {
    const bool right = config->count == 1 && config->attributes->id == 6 && config->attributes->value[0] == 1;
    if (!right || config->threads_y != 1 || config->threads_z != 1) return 1;
    return write_launch(function, config->x, config->y, config->z, config->threads, " overlap"), 0;
}
#endif

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *) {
    char line[64];
    std::snprintf(line, sizeof line, "copy %zu", bytes);
    write(line);
    std::memmove(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), bytes);
    return 0;
}

}  // extern "C"
