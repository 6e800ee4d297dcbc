// Defines the schemas into the namespace of this library.
#include "operators.h"

#include <torch/csrc/stable/library.h>

#ifndef PYGEN_NAMESPACE
#define PYGEN_NAMESPACE pygen
#endif
#define PYGEN_DEFINE(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)

PYGEN_DEFINE(PYGEN_NAMESPACE, library) {
  for (const char* schema : pygen::kSchemas) library.def(schema);
}
