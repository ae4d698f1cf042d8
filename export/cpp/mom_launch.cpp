#define MOM_KERNELS_DEFINE
#include "mom_kernels.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace {

thread_local std::string last_error;

int fail(const std::string &text) {
    last_error = text;
    return 1;
}

/* The part of the driver API that is used; its ABI is stable, so that no CUDA header is needed. */
struct LaunchAttribute { /* CUlaunchAttribute */
    uint32_t id = 0, padding = 0;
    union {
        char bytes[64];
        int allowed;
    } value{};
};

struct LaunchConfig { /* CUlaunchConfig */
    uint32_t grid[3], block[3], shared_bytes;
    void *stream;
    const LaunchAttribute *attributes;
    uint32_t num_attributes;
};

static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "must be those of the driver");

struct Driver {
    int (*init)(unsigned) = nullptr;
    int (*get_error)(int, const char **) = nullptr;
    int (*current_device)(int *) = nullptr;
    int (*device)(int *, int) = nullptr;
    int (*retain)(void **, int) = nullptr;
    int (*set_current)(void *) = nullptr;
    int (*attribute)(int *, int, int) = nullptr;
    int (*load)(void **, const void *) = nullptr;
    int (*unload)(void *) = nullptr;
    int (*function)(void **, void *, const char *) = nullptr;
    int (*set_function)(void *, int, int) = nullptr;
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                  void **) = nullptr;
    int (*launch_with)(const LaunchConfig *, void *, void **, void **) = nullptr; /* CUDA 11.8 and later */
    int (*copy)(uint64_t, uint64_t, size_t, void *) = nullptr;
    std::string missing;

    Driver() {
        void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            missing = "libcuda.so.1 could not be opened; install the NVIDIA driver";
            return;
        }
        find(library, "cuInit", init);
        find(library, "cuGetErrorString", get_error);
        find(library, "cuCtxGetDevice", current_device);
        find(library, "cuDeviceGet", device);
        find(library, "cuDevicePrimaryCtxRetain", retain);
        find(library, "cuCtxSetCurrent", set_current);
        find(library, "cuDeviceGetAttribute", attribute);
        find(library, "cuModuleLoadData", load);
        find(library, "cuModuleUnload", unload);
        find(library, "cuModuleGetFunction", function);
        find(library, "cuFuncSetAttribute", set_function);
        find(library, "cuLaunchKernel", launch);
        find(library, "cuMemcpyDtoDAsync_v2", copy);
        launch_with = reinterpret_cast<decltype(launch_with)>(dlsym(library, "cuLaunchKernelEx"));
        if (missing.empty() && init(0)) missing = "the NVIDIA driver could not be initialised; is there a GPU?";
    }

    template <class Function>
    void find(void *library, const char *name, Function &function) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (!function) missing = std::string("libcuda.so.1 must have ") + name + "; install a newer NVIDIA driver";
    }

    std::string text(int code) const {
        const char *words = nullptr;
        get_error(code, &words);
        return words ? words : "CUDA error " + std::to_string(code);
    }
};

const Driver *driver() {
    static const Driver instance;
    if (!instance.missing.empty()) {
        fail(instance.missing);
        return nullptr;
    }
    return &instance;
}

constexpr int kMaxDynamicShared = 8, kMajor = 75, kMinor = 76; /* CUfunction_attribute and CUdevice_attribute */
constexpr uint32_t kOverlap = 6; /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION */
constexpr uint32_t kDefaultShared = 48 * 1024;

bool read_file(const std::string &path, std::string &bytes) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream content;
    content << file.rdbuf();
    bytes = content.str();
    return file && !bytes.empty();
}

template <class Named>
const Named *named(const Named *list, uint32_t count, const char *name) {
    for (const Named *item = list; item != list + count; ++item)
        if (!std::strcmp(item->name, name)) return item;
    return nullptr;
}

}  // namespace

struct mom_pack {
    std::string folder;
    uint32_t architecture = 0;
    bool compile = false; /* from PTX, for a GPU that the pack has no binaries for */
    struct Loaded {
        void *module = nullptr, *function = nullptr;
    };
    std::map<const mom_kernel *, Loaded> loaded;
};

namespace {

bool is_of(const mom_kernel &kernel, const mom_pack *pack, const char *function) {
    const size_t length = std::strlen(function);
    return kernel.architecture == pack->architecture && !std::strncmp(kernel.name, function, length) &&
           kernel.name[length] == '.';
}

/* The kernels of a function for its first size, in order; largest: up to which size there are any. */
std::vector<const mom_kernel *> kernels_of(const mom_pack *pack, const char *function, uint32_t size, uint32_t &largest) {
    std::vector<const mom_kernel *> found;
    for (uint32_t i = 0; i < mom_kernel_count; ++i) {
        const mom_kernel &kernel = mom_kernels[i];
        if (!is_of(kernel, pack, function)) continue;
        largest = std::max(largest, kernel.largest);
        if (kernel.smallest <= size && size <= kernel.largest) found.push_back(&kernel);
    }
    return found;
}

/* By how much a buffer grows with the first size. */
int64_t bytes_of_one(const mom_pack *pack, const char *function, const char *buffer) {
    for (uint32_t i = 0; i < mom_kernel_count; ++i)
        if (is_of(mom_kernels[i], pack, function))
            for (uint32_t j = 0; j < mom_kernels[i].num_arguments; ++j)
                if (!std::strcmp(mom_kernels[i].arguments[j].name, buffer))
                    return mom_kernels[i].arguments[j].amount.per_unit[0];
    return 0;
}

}  // namespace

extern "C" {

const char *mom_error(void) { return last_error.c_str(); }

const char *mom_folder(void) {
    static const std::string folder = [] {
        Dl_info info;
        const std::string path = dladdr(reinterpret_cast<void *>(&mom_folder), &info) ? info.dli_fname : "";
        const size_t slash = path.rfind('/');
        return slash == std::string::npos ? std::string(".") : path.substr(0, slash);
    }();
    return folder.c_str();
}

int mom_use_device(int device) {
    const Driver *cuda = driver();
    if (!cuda) return 1;
    int handle = 0;
    void *context = nullptr;
    int code = cuda->device(&handle, device);
    if (!code) code = cuda->retain(&context, handle);
    if (!code) code = cuda->set_current(context);
    return code ? fail("device " + std::to_string(device) + ": " + cuda->text(code)) : 0;
}

int mom_device(void) {
    const Driver *cuda = driver();
    if (!cuda) return -1;
    int device = 0;
    const int code = cuda->current_device(&device);
    if (!code) return device;
    fail("a CUDA context must be current, got: " + cuda->text(code) + "; call mom_use_device first");
    return -1;
}

mom_pack *mom_open(const char *folder) {
    const Driver *cuda = driver();
    const int device = mom_device();
    int major = 0, minor = 0;
    if (device < 0) return nullptr;
    cuda->attribute(&major, kMajor, device);
    cuda->attribute(&minor, kMinor, device);
    const uint32_t own = static_cast<uint32_t>(major * 10 + minor);
    /* Binaries serve their own compute capability and, below 90, later ones of the same major. PTX below 90 serves every
     * later GPU; from 90 on the kernels use instructions of their one architecture. */
    uint32_t binary = 0, text = 0;
    for (uint32_t i = 0; i < mom_kernel_count; ++i) {
        const uint32_t other = mom_kernels[i].architecture;
        if (other == own || (own < 90 && other < own && other / 10 == own / 10)) binary = other > binary ? other : binary;
        if (other < 90 && other < own && other > text) text = other;
    }
    if (!binary && !text) {
        fail("the pack must hold kernels for compute capability " + std::to_string(own) +
             ", got none; export it again with --compute-capability " + std::to_string(own));
        return nullptr;
    }
    mom_pack *pack = new mom_pack;
    pack->folder = folder;
    pack->architecture = binary ? binary : text;
    pack->compile = !binary;
    return pack;
}

void mom_close(mom_pack *pack) {
    const Driver *cuda = driver();
    if (!pack) return;
    if (cuda)
        for (auto &entry : pack->loaded) cuda->unload(entry.second.module);
    delete pack;
}

const mom_kernel *mom_find(mom_pack *pack, const char *name, uint32_t first_unit) {
    bool known = false;
    for (uint32_t i = 0; i < mom_kernel_count; ++i) {
        const mom_kernel *kernel = &mom_kernels[i];
        if (kernel->architecture != pack->architecture || std::string(kernel->name) != name) continue;
        known = true;
        if (kernel->smallest <= first_unit && first_unit <= kernel->largest) return kernel;
    }
    fail(std::string(name) + (known ? " has no kernel for size " + std::to_string(first_unit) : " is not in the pack"));
    return nullptr;
}

int64_t mom_value(const mom_formula *formula, const uint32_t units[3]) {
    int64_t value = formula->base;
    for (int i = 0; i < 3; ++i) value += formula->per_unit[i] * units[i];
    if (formula->per)
        value += formula->times * ((formula->each * units[formula->unit] + formula->per - 1) / formula->per);
    if (!formula->digits) return value;
    int64_t digits = 0;
    for (; value; value >>= 1) ++digits;
    return digits;
}

uint32_t mom_programs(const mom_kernel *kernel, int axis, const uint32_t units[3]) {
    return static_cast<uint32_t>(mom_value(&kernel->grid[axis], units));
}

int64_t mom_amount(const mom_argument *argument, const uint32_t units[3]) { return mom_value(&argument->amount, units); }

int mom_launch(mom_pack *pack, const mom_kernel *kernel, const uint32_t units[3], const uint64_t *pointers,
               const mom_scalar *scalars, void *stream) {
    const Driver *cuda = driver();
    if (!cuda) return 1;
    mom_pack::Loaded &loaded = pack->loaded[kernel];
    if (!loaded.function) {
        std::string bytes;
        const std::string path = pack->folder + "/" + (pack->compile ? kernel->ptx : kernel->cubin);
        if (!read_file(path, bytes)) return fail(path + " could not be read; copy the whole pack");
        int code = cuda->load(&loaded.module, bytes.c_str());
        if (!code) code = cuda->function(&loaded.function, loaded.module, kernel->symbol);
        if (!code && kernel->shared_bytes > kDefaultShared)
            code = cuda->set_function(loaded.function, kMaxDynamicShared, static_cast<int>(kernel->shared_bytes));
        if (code) {
            loaded.function = nullptr;
            return fail(path + ": " + cuda->text(code));
        }
    }
    std::vector<uint64_t> storage(kernel->num_arguments + kernel->num_hidden, 0);
    std::vector<void *> arguments;
    for (uint32_t i = 0; i < kernel->num_arguments; ++i) {
        const mom_argument &argument = kernel->arguments[i];
        mom_scalar value;
        if (argument.kind == MOM_POINTER) {
            if (*pointers % 16) return fail(std::string(argument.name) + " must be aligned to 16 bytes");
            storage[i] = *pointers++;
        } else {
            if (scalars)
                value = *scalars++;
            else if (argument.kind == MOM_FLOAT32)
                value.real = argument.real;
            else
                value.whole = static_cast<int32_t>(mom_amount(&argument, units));
            storage[i] = static_cast<uint32_t>(value.whole);
        }
    }
    for (uint64_t &slot : storage) arguments.push_back(&slot);
    const uint32_t x = mom_programs(kernel, 0, units), y = mom_programs(kernel, 1, units);
    const uint32_t z = mom_programs(kernel, 2, units);
    if (!x || !y || !z) return 0;
    int code = 0;
    if (kernel->overlap && cuda->launch_with) {
        LaunchAttribute overlap;
        overlap.id = kOverlap;
        overlap.value.allowed = 1;
        const LaunchConfig config{{x, y, z}, {kernel->threads, 1, 1}, kernel->shared_bytes, stream, &overlap, 1};
        code = cuda->launch_with(&config, loaded.function, arguments.data(), nullptr);
    } else {
        code = cuda->launch(loaded.function, x, y, z, kernel->threads, 1, 1, kernel->shared_bytes, stream,
                            arguments.data(), nullptr);
    }
    return code ? fail(std::string(kernel->name) + ": " + cuda->text(code)) : 0;
}

int mom_run(mom_pack *pack, const char *function, const uint32_t units[3], const mom_buffer *buffers, uint32_t count,
            const mom_number *numbers, uint32_t num_numbers, void *stream) {
    uint32_t largest = 0;
    const std::vector<const mom_kernel *> kernels = kernels_of(pack, function, units[0], largest);
    if (kernels.empty() && (num_numbers || units[1] || !largest || units[0] < largest))
        return fail(std::string(function) + " has no kernel for size " + std::to_string(units[0]));
    if (kernels.empty()) {
        std::vector<mom_buffer> part(buffers, buffers + count);
        for (uint32_t first = 0; first < units[0]; first += largest) {
            const uint32_t piece[3] = {std::min(largest, units[0] - first), 0, 0};
            for (uint32_t i = 0; i < count; ++i)
                part[i].pointer = buffers[i].pointer + first * bytes_of_one(pack, function, buffers[i].name);
            if (mom_run(pack, function, piece, part.data(), count, nullptr, 0, stream)) return 1;
        }
        return 0;
    }
    for (const mom_kernel *kernel : kernels) {
        std::vector<uint64_t> pointers;
        std::vector<mom_scalar> scalars;
        for (uint32_t j = 0; j < kernel->num_arguments; ++j) {
            const mom_argument &argument = kernel->arguments[j];
            if (argument.kind == MOM_POINTER) {
                const mom_buffer *buffer = named(buffers, count, argument.name);
                if (!buffer)
                    return fail(std::string(kernel->name) + " needs a buffer " + argument.name + ", got none; pass it");
                pointers.push_back(buffer->pointer);
                continue;
            }
            const mom_number *number = named(numbers, num_numbers, argument.name);
            mom_scalar value;
            if (argument.kind == MOM_FLOAT32)
                value.real = argument.real;
            else
                value.whole = number ? number->value : static_cast<int32_t>(mom_amount(&argument, units));
            scalars.push_back(value);
        }
        if (mom_launch(pack, kernel, units, pointers.data(), scalars.data(), stream)) return 1;
    }
    return 0;
}

int mom_copy(uint64_t to, uint64_t from, uint64_t bytes, void *stream) {
    const Driver *cuda = driver();
    if (!cuda) return 1;
    const int code = to == from ? 0 : cuda->copy(to, from, bytes, stream);
    return code ? fail("copy: " + cuda->text(code)) : 0;
}

}  // extern "C"
