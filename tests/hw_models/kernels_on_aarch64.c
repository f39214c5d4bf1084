/* Runs compiled kernels on another machine's processor: `program LIST` reads lines "symbol count", each followed by that many
   lines "type bits elements file"; every buffer is read from its file, and written back to it after the call. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { int32_t device_type, device_id; } DLDevice;
typedef struct { uint8_t code, bits; uint16_t lanes; } DLDataType;
typedef struct {
  void *data; DLDevice device; int32_t ndim; DLDataType dtype; int64_t *shape, *strides; uint64_t byte_offset;
} DLTensor;
typedef struct { int32_t type_index; uint32_t small; union { int64_t i; void *p; } v; } Any;
typedef int (*Function)(void *, const Any *, int32_t, Any *);

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) fprintf(stderr, "%s", parts[i] ? parts[i] : "");
  fprintf(stderr, "\n");
}

#define ONE(symbol) extern int symbol(void *, const Any *, int32_t, Any *);
#include "symbols.h"
#undef ONE
#define ONE(symbol) {#symbol, symbol},
static struct { const char *name; Function call; } known[] = {
#include "symbols.h"
};

int main(int argc, char **argv) {
  FILE *list = fopen(argv[1], "r");
  char symbol[256], type[16], file[4096];
  int count, bits;
  while (fscanf(list, "%255s %d", symbol, &count) == 2) {
    Any *arguments = calloc(count, sizeof(Any)), result = {0};
    DLTensor *tensors = calloc(count, sizeof(DLTensor));
    char **files = calloc(count, sizeof(char *));
    int64_t *shapes = calloc(count, sizeof(int64_t));
    for (int i = 0; i < count; i++) {
      if (fscanf(list, "%15s %d %ld %4095s", type, &bits, &shapes[i], file) != 4) return 2;
      size_t size = shapes[i] * bits / 8;
      void *data = aligned_alloc(64, (size + 63) / 64 * 64);
      FILE *from = fopen(file, "rb");
      if (!from || fread(data, 1, size, from) != size) return 3;
      fclose(from);
      asprintf(&files[i], "%s", file);
      DLDataType dtype = {type[0] == 'i' ? 0 : type[0] == 'u' ? 1 : 2, bits, 1};
      tensors[i] = (DLTensor){data, {1, 0}, 1, dtype, &shapes[i], NULL, 0};
      arguments[i] = (Any){7, 0, {.p = &tensors[i]}};
    }
    int found = 0;
    for (size_t k = 0; k < sizeof known / sizeof *known; k++)
      if (!__builtin_strcmp(known[k].name, symbol)) found = 1, found += known[k].call(NULL, arguments, count, &result) != 0;
    if (found != 1) return fprintf(stderr, "%s failed\n", symbol), 4;
    for (int i = 0; i < count; i++) {
      FILE *to = fopen(files[i], "wb");
      fwrite(tensors[i].data, 1, shapes[i] * tensors[i].dtype.bits / 8, to);
      fclose(to);
    }
  }
  return 0;
}
