// A libcuda.so.1 without a GPU: it checks what it is given as the driver would, and notes launches.
// Built and steered by stub_driver.py. Only the calls that launching kernels takes are here.

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int32_t Result;
enum {
  OK = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, UNSUPPORTED_PTX = 222, INVALID_HANDLE = 400,
  NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900,
};
enum { DEVICES = 8, RECORDS = 4096, PARAMETERS = 64, BYTES = 512, MODULES = 1 << 16 };

typedef struct { int32_t device; } Context;

typedef struct {
  Context* context;
  size_t size;
  char* image;
} Module;

typedef struct {
  Module* module;
  char name[128];
  int32_t parameters, bytes;
  int32_t offset[PARAMETERS], size[PARAMETERS];
} Function;

typedef struct {
  char name[128];
  uint64_t image;  // a digest of the binary
  uint64_t stream;
  int32_t device;
  uint32_t grid[3], block[3], shared, bytes;
  uint8_t parameters[BYTES];
} Record;

static Context contexts[DEVICES];
static int32_t device_count = 1, driver_version = 13000, capabilities[DEVICES];
static int32_t initialised, capturing, recording = 1, failing_code;
static char failing[64];
static Record records[RECORDS];
static int64_t record_count, module_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread Context* current;

// ---- steering ----

void stub_reset(int32_t devices, const int32_t* capability, int32_t version) {
  device_count = devices;
  driver_version = version;
  for (int i = 0; i < devices; ++i) capabilities[i] = capability[i], contexts[i].device = i;
  capturing = 0, recording = 1, failing[0] = 0;
  record_count = module_count = 0;
  current = NULL;
}
void stub_capture(int32_t on) { capturing = on; }
void stub_record(int32_t on) { recording = on; }
// The next call of a function returns a code.
void stub_fail(const char* function, int32_t code) {
  snprintf(failing, sizeof failing, "%s", function);
  failing_code = code;
}
int64_t stub_launches(void) { return record_count; }
int64_t stub_modules(void) { return module_count; }
int64_t stub_record_size(void) { return sizeof(Record); }
const Record* stub_launch(int64_t i) { return &records[i % RECORDS]; }

static Result fails(const char* function) {
  if (!failing[0] || strcmp(failing, function)) return OK;
  failing[0] = 0;
  return failing_code;
}
#define BEGIN                                    \
  do {                                           \
    const Result wanted = fails(__func__);       \
    if (wanted) return wanted;                   \
    if (!initialised) return NOT_INITIALIZED;    \
  } while (0)

// ---- devices and contexts ----

Result cuInit(unsigned flags) {
  const Result wanted = fails(__func__);
  if (wanted) return wanted;
  initialised = 1;
  return flags ? INVALID_VALUE : OK;
}
Result cuDriverGetVersion(int32_t* version) { return *version = driver_version, OK; }
Result cuDeviceGetCount(int32_t* count) { BEGIN; return *count = device_count, OK; }
Result cuDeviceGet(int32_t* device, int32_t i) {
  BEGIN;
  if (i < 0 || i >= device_count) return INVALID_DEVICE;
  return *device = i, OK;
}
Result cuDeviceGetAttribute(int32_t* value, int32_t attribute, int32_t device) {
  BEGIN;
  if (attribute == 75) *value = capabilities[device] / 10;
  else if (attribute == 76) *value = capabilities[device] % 10;
  else *value = attribute == 10 ? 32 : 232448;
  return OK;
}
Result cuDevicePrimaryCtxRetain(void** context, int32_t device) {
  BEGIN;
  return *context = &contexts[device], OK;
}
Result cuCtxGetCurrent(void** context) { BEGIN; return *context = current, OK; }
Result cuCtxSetCurrent(void* context) { BEGIN; return current = context, OK; }
Result cuCtxGetLimit(size_t* value, int32_t limit) { (void)limit; return *value = 0, OK; }
Result cuCtxSetLimit(int32_t limit, size_t value) { (void)limit, (void)value; return OK; }
Result cuStreamIsCapturing(void* stream, int32_t* status) {
  BEGIN;
  (void)stream;
  return *status = capturing ? 1 : 0, OK;
}
Result cuGetErrorString(int32_t code, const char** text) {
  switch (code) {
    case INVALID_VALUE: *text = "invalid argument"; break;
    case INVALID_IMAGE: *text = "device kernel image is invalid"; break;
    case INVALID_CONTEXT: *text = "invalid device context"; break;
    case NO_BINARY_FOR_GPU: *text = "no kernel image is available for execution on the device"; break;
    case UNSUPPORTED_PTX: *text = "the provided PTX was compiled with an unsupported toolchain."; break;
    case CAPTURE_UNSUPPORTED: *text = "operation not permitted when stream is capturing"; break;
    default: return *text = NULL, INVALID_VALUE;
  }
  return OK;
}
Result cuPointerGetAttribute(void* value, int32_t attribute, uint64_t pointer) {
  (void)attribute;
  return *(uint64_t*)value = pointer, OK;
}
Result cuPointerGetAttributes(unsigned n, int32_t* attributes, void** values, uint64_t pointer) {
  for (unsigned i = 0; i < n; ++i) (void)attributes, *(uint64_t*)values[i] = pointer;
  return OK;
}

// ---- modules ----

static uint16_t u16(const char* p) { uint16_t x; return memcpy(&x, p, 2), x; }
static uint32_t u32(const char* p) { uint32_t x; return memcpy(&x, p, 4), x; }
static uint64_t u64(const char* p) { uint64_t x; return memcpy(&x, p, 8), x; }
static int is_elf(const char* image) { return !memcmp(image, "\x7f" "ELF", 4); }

// The tables of sections and of segments are its end.
static size_t elf_size(const char* elf) {
  const size_t sections = u64(elf + 40) + (size_t)u16(elf + 58) * u16(elf + 60);
  const size_t segments = u64(elf + 32) + (size_t)u16(elf + 54) * u16(elf + 56);
  return sections > segments ? sections : segments;
}

// The compute capability that a binary is for: bits 8 to 15 of its flags, of old ones 0 to 7.
static int32_t elf_capability(const char* elf) {
  const uint32_t flags = u32(elf + 48);
  return elf[8] >= 8 ? (flags >> 8) & 0xff : flags & 0xff;
}

static const char* section(const char* elf, const char* name, size_t* size) {
  const char* table = elf + u64(elf + 40);
  const int each = u16(elf + 58), count = u16(elf + 60), names = u16(elf + 62);
  const char* strings = elf + u64(table + names * each + 24);
  for (int i = 0; i < count; ++i) {
    const char* header = table + i * each;
    if (strcmp(strings + u32(header), name)) continue;
    *size = u64(header + 32);
    return elf + u64(header + 24);
  }
  return NULL;
}

Result cuModuleLoadData(void** out, const char* image) {
  BEGIN;
  if (current == NULL) return INVALID_CONTEXT;
  if (capturing) return CAPTURE_UNSUPPORTED;
  const int32_t device = capabilities[current->device];
  size_t size;
  if (is_elf(image)) {
    if (u16(image + 18) != 190) return INVALID_IMAGE;
    const int32_t made_for = elf_capability(image);
    // From 9.0 on Triton compiles for one architecture alone.
    if (made_for >= 90 ? made_for != device : made_for / 10 != device / 10 || made_for > device)
      return NO_BINARY_FOR_GPU;
    size = elf_size(image);
  } else {
    int major, minor, target;
    const char* version = strstr(image, ".version ");
    const char* where = strstr(image, ".target sm_");
    if (!version || !where || sscanf(version, ".version %d.%d", &major, &minor) != 2 ||
        sscanf(where, ".target sm_%d", &target) != 1)
      return INVALID_IMAGE;
    // PTX 8.0 to 8.5 came with CUDA 12.0 to 12.5, 8.6 to 8.8 with 12.7 to 12.9, 9.x with 13.x.
    const int needs = major == 9 ? 13000 + 10 * minor : 12000 + 10 * (minor + (minor >= 6));
    if (driver_version < needs) return UNSUPPORTED_PTX;
    if (target > device) return NO_BINARY_FOR_GPU;
    size = strlen(image) + 1;
  }
  Module* module = malloc(sizeof *module);
  module->context = current, module->size = size;
  module->image = memcpy(malloc(size), image, size);
  pthread_mutex_lock(&lock);
  ++module_count;
  pthread_mutex_unlock(&lock);
  return *out = module, OK;
}

Result cuModuleGetFunction(void** out, Module* module, const char* name) {
  BEGIN;
  Function* f = calloc(1, sizeof *f);
  f->module = module;
  snprintf(f->name, sizeof f->name, "%s", name);
  if (!is_elf(module->image)) {
    char entry[160];
    snprintf(entry, sizeof entry, ".entry %s(", name);
    return strstr(module->image, entry) ? (*out = f, OK) : NOT_FOUND;
  }
  char wanted[160];
  size_t size = 0;
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  const char* info = section(module->image, wanted, &size);
  if (!info) return NOT_FOUND;
  for (size_t at = 0; at < size;) {
    const uint8_t form = info[at], attribute = info[at + 1];
    const uint16_t value = u16(info + at + 2);
    const char* data = info + at + 4;
    at += 4;
    if (form != 4) {
      if (attribute == 0x19) f->bytes = value;
      continue;
    }
    if (attribute == 0x17) {
      const int i = u16(data + 4);
      f->offset[i] = u16(data + 6), f->size[i] = u32(data + 8) >> 18;
      if (i >= f->parameters) f->parameters = i + 1;
    }
    at += value;
  }
  return *out = f, OK;
}

Result cuFuncGetAttribute(int32_t* value, int32_t attribute, Function* f) {
  (void)f;
  return *value = attribute == 0 ? 1024 : 0, OK;
}
Result cuFuncSetAttribute(Function* f, int32_t attribute, int32_t value) {
  (void)f, (void)attribute, (void)value;
  return OK;
}
Result cuFuncSetCacheConfig(Function* f, int32_t config) { (void)f, (void)config; return OK; }
Result cuOccupancyMaxActiveClusters(int32_t* n, Function* f, const void* config) {
  (void)f, (void)config;
  return *n = 1, OK;
}
Result cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }
Result cuTensorMapEncodeIm2col(void) { return INVALID_VALUE; }

// ---- launches ----

static uint64_t digest(const char* data, size_t size) {
  uint64_t hash = 14695981039346656037ull;
  for (size_t i = 0; i < size; ++i) hash = (hash ^ (uint8_t)data[i]) * 1099511628211ull;
  return hash;
}
uint64_t stub_digest(const char* data, size_t size) { return digest(data, size); }

static Result launch(Function* f, const uint32_t* grid, const uint32_t* block, uint32_t shared,
                     void* stream, void** parameters, void** extra) {
  if (current == NULL) return INVALID_CONTEXT;
  if (f == NULL || f->module->context != current) return INVALID_HANDLE;
  if (!grid[0] || grid[0] > 0x7fffffffu || !block[0] || block[0] > 1024) return INVALID_VALUE;
  uint8_t bytes[BYTES] = {0};
  size_t count = f->bytes;
  if (extra) {
    const void* buffer = NULL;
    for (int i = 0; extra[i]; i += 2) {
      if (extra[i] == (void*)1) buffer = extra[i + 1];
      if (extra[i] == (void*)2) count = *(size_t*)extra[i + 1];
    }
    if (!buffer || count > BYTES || (f->bytes && count != (size_t)f->bytes)) return INVALID_VALUE;
    memcpy(bytes, buffer, count);
  } else {
    for (int i = 0; i < f->parameters; ++i)
      memcpy(bytes + f->offset[i], parameters[i], f->size[i]);
  }
  if (!recording) return OK;
  pthread_mutex_lock(&lock);
  Record* r = &records[record_count++ % RECORDS];
  memset(r, 0, sizeof *r);
  memcpy(r->name, f->name, sizeof r->name);
  r->image = digest(f->module->image, f->module->size);
  r->stream = (uint64_t)stream, r->device = current->device;
  memcpy(r->grid, grid, sizeof r->grid), memcpy(r->block, block, sizeof r->block);
  r->shared = shared, r->bytes = (uint32_t)count;
  memcpy(r->parameters, bytes, count);
  pthread_mutex_unlock(&lock);
  return OK;
}

Result cuLaunchKernel(Function* f, uint32_t gx, uint32_t gy, uint32_t gz, uint32_t bx, uint32_t by,
                      uint32_t bz, uint32_t shared, void* stream, void** parameters, void** extra) {
  BEGIN;
  const uint32_t grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  return launch(f, grid, block, shared, stream, parameters, extra);
}

typedef struct {
  uint32_t grid[3], block[3], shared;
  void* stream;
  void* attributes;
  uint32_t count;
} Config;

Result cuLaunchKernelEx(const Config* config, Function* f, void** parameters, void** extra) {
  BEGIN;
  return launch(f, config->grid, config->block, config->shared, config->stream, parameters, extra);
}
