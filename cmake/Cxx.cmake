# SPDX-License-Identifier: Apache-2.0
# C++ for the few files that need it; the target kvq_cxx_flags carries its flags, which files of other languages in the
# same target do not get.
include_guard(GLOBAL)
enable_language(CXX)
add_library(kvq_cxx_flags INTERFACE)
target_compile_features(kvq_cxx_flags INTERFACE cxx_std_17)
set(kvq_cxx_options -ffp-contract=off -fno-math-errno -Wall -Wextra -Wshadow)
if(KVQ_WERROR)
  list(APPEND kvq_cxx_options -Werror)
endif()
if(KVQ_SANITIZE)
  list(APPEND kvq_cxx_options -fsanitize=${KVQ_SANITIZE} -fno-omit-frame-pointer)
  target_link_options(kvq_cxx_flags INTERFACE -fsanitize=${KVQ_SANITIZE})
endif()
target_compile_options(kvq_cxx_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${kvq_cxx_options}>")
