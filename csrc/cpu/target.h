// Instruction sets for parts of a file: what lies between BEGIN and END may use them, whatever the compiler's options.
// Standard headers are included before BEGIN: their inline functions are shared with files for other processors.
#pragma once

#define TORCHMIX_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TORCHMIX_TARGET_BEGIN(features) \
  TORCHMIX_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TORCHMIX_TARGET_END TORCHMIX_PRAGMA(clang attribute pop)
#else
#define TORCHMIX_TARGET_BEGIN(features) _Pragma("GCC push_options") TORCHMIX_PRAGMA(GCC target(features))
#define TORCHMIX_TARGET_END _Pragma("GCC pop_options")
#endif
#define TORCHMIX_INLINE __attribute__((always_inline))
