// Runs recorded launches of a kernel pack and compares every buffer bit for bit.
//
//   check_pack PACK CASES
//
// CASES/launches.txt has a line "launch KERNEL unit0 unit1 unit2 buffers" for a kernel, or "run FUNCTION ..." for all kernels of
// a function, and per buffer a line "name input expected": raw files with its bytes before and after. Guard bands around
// each buffer must keep their bytes.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "mom_kernels.h"

namespace {

constexpr size_t kGuard = 4096;
constexpr unsigned char kPattern = 0xa5;

struct Memory {
    int (*allocate)(uint64_t *, size_t);
    int (*free)(uint64_t);
    int (*to_device)(uint64_t, const void *, size_t);
    int (*to_host)(void *, uint64_t, size_t);
    int (*synchronize)();
};

template <class Function>
void find(void *library, const char *name, Function &function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
}

using Bytes = std::vector<char>;

Bytes read(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// Bytes of the buffer that differ, or -1 for a guard band that was written.
long differences(const Bytes &got, const Bytes &expected) {
    const size_t size = expected.size();
    for (size_t i = 0; i < kGuard; ++i)
        if (static_cast<unsigned char>(got[i]) != kPattern || static_cast<unsigned char>(got[kGuard + size + i]) != kPattern)
            return -1;
    long count = 0;
    for (size_t i = 0; i < size; ++i) count += got[kGuard + i] != expected[i];
    return count;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: check_pack PACK CASES\n"), 2;
    const std::string folder = argv[2];
    mom_pack *pack = mom_use_device(0) ? nullptr : mom_open(argv[1]);
    if (!pack) return std::fprintf(stderr, "%s\n", mom_error()), 2;
    Memory memory{};
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    find(library, "cuMemAlloc_v2", memory.allocate);
    find(library, "cuMemFree_v2", memory.free);
    find(library, "cuMemcpyHtoD_v2", memory.to_device);
    find(library, "cuMemcpyDtoH_v2", memory.to_host);
    find(library, "cuCtxSynchronize", memory.synchronize);

    std::ifstream list(folder + "/launches.txt");
    std::string kind, name;
    uint32_t units[3];
    size_t count = 0;
    int launches = 0, wrong = 0;
    while (list >> kind >> name >> units[0] >> units[1] >> units[2] >> count) {
        std::vector<std::string> names(count);
        std::vector<uint64_t> bases(count), pointers(count);
        std::vector<Bytes> expected(count);
        for (size_t i = 0; i < count; ++i) {
            std::string before, after;
            list >> names[i] >> before >> after;
            const Bytes input = read(folder + "/" + before);
            expected[i] = read(folder + "/" + after);
            if (input.size() != expected[i].size()) return std::fprintf(stderr, "%s: sizes differ\n", before.c_str()), 2;
            Bytes padded(input.size() + 2 * kGuard, static_cast<char>(kPattern));
            if (!input.empty()) std::memcpy(padded.data() + kGuard, input.data(), input.size());
            if (memory.allocate(&bases[i], padded.size()) || memory.to_device(bases[i], padded.data(), padded.size()))
                return std::fprintf(stderr, "%s: no memory\n", name.c_str()), 2;
            pointers[i] = bases[i] + kGuard;
        }
        int failed;
        if (kind == "launch") {
            const mom_kernel *kernel = mom_find(pack, name.c_str(), units[0]);
            if (!kernel) return std::fprintf(stderr, "%s\n", mom_error()), 2;
            size_t i = 0;
            for (uint32_t j = 0; j < kernel->num_arguments; ++j) {
                const mom_argument *argument = &kernel->arguments[j];
                if (argument->kind != MOM_POINTER) continue;
                if (i == count || names[i] != argument->name ||
                    static_cast<int64_t>(expected[i].size()) != mom_amount(argument, units))
                    return std::fprintf(stderr, "%s: %s is not in the table so\n", name.c_str(), argument->name), 2;
                ++i;
            }
            failed = mom_launch(pack, kernel, units, pointers.data(), nullptr, nullptr);
        } else {
            std::vector<mom_buffer> buffers;
            for (size_t i = 0; i < count; ++i) buffers.push_back({names[i].c_str(), pointers[i]});
            failed = mom_run(pack, name.c_str(), units, buffers.data(), static_cast<uint32_t>(count), nullptr, 0, nullptr);
        }
        if (failed || memory.synchronize()) return std::fprintf(stderr, "%s: %s\n", name.c_str(), mom_error()), 2;
        ++launches;
        for (size_t i = 0; i < count; ++i) {
            Bytes got(expected[i].size() + 2 * kGuard);
            memory.to_host(got.data(), bases[i], got.size());
            memory.free(bases[i]);
            if (const long bad = differences(got, expected[i])) {
                ++wrong;
                std::printf("%s [%u, %u, %u] %s: %ld of %zu bytes differ\n", name.c_str(), units[0], units[1], units[2],
                            names[i].c_str(), bad, expected[i].size());
            }
        }
    }
    mom_close(pack);
    std::printf("%d cases, %d buffers differ\n", launches, wrong);
    return wrong || !launches;
}
