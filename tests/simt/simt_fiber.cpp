// SPDX-License-Identifier: Apache-2.0
// Switching stacks; see simt_fiber.h.
#include "simt_fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SIMT_TSAN 1
#else
#define SIMT_TSAN 0
#endif

namespace simt {

// The codec keeps tens of kilobytes on the stack, sanitizers several times that. Only what is touched takes memory.
enum { STACK_BYTES = 512 << 10, GUARD_BYTES = 64 << 10 };

struct Fiber {
    char *stack;
#if defined(__x86_64__)
    void *inside, *outside; // stack pointers while it does not run, and while it does
#else
    ucontext_t inside, outside;
#endif
    void (*run)();
    const void *outer_stack; // for the address sanitizer
    size_t      outer_bytes;
    void       *inner_fake, *tsan_inside, *tsan_outside;
};

static Fiber *starting; // whose first entry is under way

Fiber *fiber_create() {
    Fiber *fiber = static_cast<Fiber *>(calloc(1, sizeof(Fiber)));
    void  *memory = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    // an overflow ends the program instead of running on over another thread's stack
    if (fiber == nullptr || memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0) {
        perror("stacks of emulated threads");
        abort();
    }
    fiber->stack = static_cast<char *>(memory) + GUARD_BYTES;
    return fiber;
}

void fiber_destroy(Fiber *fiber) {
#if SIMT_TSAN
    if (fiber->tsan_inside != nullptr) __tsan_destroy_fiber(fiber->tsan_inside);
#endif
    (void)munmap(fiber->stack - GUARD_BYTES, GUARD_BYTES + STACK_BYTES);
    free(fiber);
}

static void fiber_main() {
    Fiber *fiber = starting;
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &fiber->outer_stack, &fiber->outer_bytes);
#endif
    fiber->run();
    abort(); // run may not return
}

#if defined(__x86_64__)
extern "C" void simt_switch(void **save, void *load);
// The calling convention keeps six registers; the return address is on the stack.
asm(".text\n"
    ".globl simt_switch\n"
    ".type simt_switch, @function\n"
    "simt_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n"
    ".size simt_switch, .-simt_switch\n");

static void set_up(Fiber *fiber) {
    void **top = reinterpret_cast<void **>(fiber->stack + STACK_BYTES) - 2;
    *--top = nullptr; // where fiber_main would return to; leaves the alignment that a function expects
    *--top = reinterpret_cast<void *>(fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber->inside = top;
}
static void go_in(Fiber *fiber) { simt_switch(&fiber->outside, fiber->inside); }
static void go_out(Fiber *fiber) { simt_switch(&fiber->inside, fiber->outside); }
#else
static void set_up(Fiber *fiber) {
    getcontext(&fiber->inside);
    fiber->inside.uc_stack.ss_sp = fiber->stack;
    fiber->inside.uc_stack.ss_size = STACK_BYTES;
    fiber->inside.uc_link = nullptr;
    makecontext(&fiber->inside, fiber_main, 0);
}
static void go_in(Fiber *fiber) { swapcontext(&fiber->outside, &fiber->inside); }
static void go_out(Fiber *fiber) { swapcontext(&fiber->inside, &fiber->outside); }
#endif

void fiber_prepare(Fiber *fiber, void (*run)()) {
    fiber->run = run;
    fiber->inner_fake = nullptr;
#if SIMT_ASAN
    __asan_unpoison_memory_region(fiber->stack, STACK_BYTES); // what was abandoned there is gone
#endif
#if SIMT_TSAN
    if (fiber->tsan_inside != nullptr) __tsan_destroy_fiber(fiber->tsan_inside);
    fiber->tsan_inside = __tsan_create_fiber(0);
#endif
    set_up(fiber);
}

void fiber_enter(Fiber *fiber) {
    starting = fiber;
#if SIMT_TSAN
    fiber->tsan_outside = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber->tsan_inside, 0);
#endif
#if SIMT_ASAN
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber->stack, STACK_BYTES);
#endif
    go_in(fiber);
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fiber_leave(Fiber *fiber) {
#if SIMT_TSAN
    __tsan_switch_to_fiber(fiber->tsan_outside, 0);
#endif
#if SIMT_ASAN
    __sanitizer_start_switch_fiber(&fiber->inner_fake, fiber->outer_stack, fiber->outer_bytes);
#endif
    go_out(fiber);
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(fiber->inner_fake, &fiber->outer_stack, &fiber->outer_bytes);
#endif
}

} // namespace simt
