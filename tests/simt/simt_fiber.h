// SPDX-License-Identifier: Apache-2.0
//
// Stacks that can be left and entered again: each CUDA thread runs on one. Switching saves the registers that a call
// keeps and nothing else, because a block of 1024 threads changes stacks millions of times; the C library's own way
// (ucontext) makes two system calls each time and is only used on processors that simt_fiber.cpp does not know.
#ifndef SIMT_FIBER_H
#define SIMT_FIBER_H

#include <stddef.h>

namespace simt {

struct Fiber;

Fiber *fiber_create(); // ends the program where there is no memory
void   fiber_destroy(Fiber *fiber);
// The next fiber_enter calls `run` on an empty stack; what was on it is forgotten. `run` may not return.
void fiber_prepare(Fiber *fiber, void (*run)());
void fiber_enter(Fiber *fiber); // until it leaves
void fiber_leave(Fiber *fiber); // called on its stack: back to who entered it

} // namespace simt

#endif
