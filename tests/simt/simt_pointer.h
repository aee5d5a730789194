// SPDX-License-Identifier: Apache-2.0
//
// Pointers of emulated kernels. p[i] gives a reference that checks when it is read or assigned, and knows the line: the
// compiler puts it into the conversion of the index. There is no *p and no p->member, which could not know it: write
// p[0], and copy a structure before looking into it. There is no `auto v = p[i]` either (it would delay the read): such
// a reference can only be used where it was made.
#ifndef SIMT_POINTER_H
#define SIMT_POINTER_H

#include <string.h>

#include <tuple>
#include <type_traits>

#include "simt_machine.h"

namespace simt {

template <typename T, Space S> class Reference;

// The value of an operand that may be a reference.
template <typename T> const T                     &plain(const T &x) { return x; }
template <typename T, Space S> std::remove_cv_t<T> plain(const Reference<T, S> &x) { return x.read(); }

struct Index {
    ptrdiff_t value;
    Place     at;
    template <typename I>
    Index(const I &i, Place where = Place::here()) : value(static_cast<ptrdiff_t>(plain(i))), at(where) {}
};

template <typename T, Space S> struct Pointer {
    using Value = std::remove_cv_t<T>;
    Memory   *memory = nullptr;
    ptrdiff_t offset = 0; // bytes; the address, when it is in no memory of the device

    Pointer() = default;
    Pointer(decltype(nullptr)) {}
    Pointer(Memory *in, ptrdiff_t at) : memory(in), offset(at) {}
    // What a launcher passes to a kernel.
    template <typename U, typename = std::enable_if_t<S == GLOBAL && std::is_convertible<U *, T *>::value>>
    Pointer(U *raw) : memory(find_memory(raw)) {
        const volatile void *base = memory != nullptr ? memory->base : nullptr;
        offset = reinterpret_cast<intptr_t>(raw) - reinterpret_cast<intptr_t>(base);
    }
    template <typename U, typename = std::enable_if_t<std::is_same<const U, T>::value>>
    Pointer(const Pointer<U, S> &other) : memory(other.memory), offset(other.offset) {}

    Reference<T, S> operator[](Index i) const { return {*this + i.value, i.at}; }

    template <typename I> Pointer operator+(I n) const {
        return {memory, offset + static_cast<ptrdiff_t>(n) * static_cast<ptrdiff_t>(sizeof(T))};
    }
    template <typename I, typename = std::enable_if_t<!std::is_class<I>::value>> Pointer operator-(I n) const {
        return {memory, offset - static_cast<ptrdiff_t>(n) * static_cast<ptrdiff_t>(sizeof(T))};
    }
    ptrdiff_t operator-(Pointer b) const { return (offset - b.offset) / static_cast<ptrdiff_t>(sizeof(T)); }
    template <typename I> Pointer &operator+=(I n) { return *this = *this + n; }
    template <typename I> Pointer &operator-=(I n) { return *this = *this - n; }
    Pointer                       &operator++() { return *this += 1; }
    bool                           operator==(Pointer b) const { return memory == b.memory && offset == b.offset; }
    bool                           operator!=(Pointer b) const { return !(*this == b); }
    bool                           operator<(Pointer b) const { return offset < b.offset; }
};

template <typename T, Space S> typename Pointer<T, S>::Value load(Pointer<T, S> p, Place at) {
    typename Pointer<T, S>::Value value{};
    const void                   *from = touch(p.memory, p.offset, sizeof value, alignof(T), READ, at);
    if (from != nullptr) memcpy(&value, from, sizeof value);
    return value;
}

template <typename T, Space S> void store(Pointer<T, S> p, const T &value, Place at) {
    void *to = touch(p.memory, p.offset, sizeof value, alignof(T), WRITE, at);
    if (to != nullptr) memcpy(to, &value, sizeof value);
}

template <typename T, Space S> class Reference {
    using Value = std::remove_cv_t<T>;
    Pointer<T, S> pointer;
    Place         at;

    template <typename F> void change(F f) const { store(pointer, static_cast<Value>(f(load(pointer, at))), at); }

  public:
    Reference(Pointer<T, S> p, Place where) : pointer(p), at(where) {}
    Reference(const Reference &) = default;

    Value         read() const { return load(pointer, at); }
                  operator Value() const               &&{ return read(); }
    Pointer<T, S> operator&() const { return pointer; }

    void                                operator=(const Value &value) const                                &&{ store(pointer, value, at); }
    void                                operator=(const Reference &other) const                                &&{ store(pointer, other.read(), at); }
    template <typename U, Space V> void operator=(const Reference<U, V> &other) const && {
        store(pointer, static_cast<Value>(other.read()), at);
    }
    // Read, then written: another thread may come between.
#define SIMT_COMPOUND(op)                                                                                              \
    template <typename U> void operator op##=(const U &by) const && {                                                  \
        const auto &operand = plain(by);                                                                               \
        change([&](Value old) { return old op operand; });                                                             \
    }
    SIMT_COMPOUND(+)
    SIMT_COMPOUND(-)
    SIMT_COMPOUND(*)
    SIMT_COMPOUND(/)
    SIMT_COMPOUND(|)
    SIMT_COMPOUND(&)
    SIMT_COMPOUND(^)
    SIMT_COMPOUND(<<)
    SIMT_COMPOUND(>>)
#undef SIMT_COMPOUND
    void operator++() const && {
        change([](Value old) { return old + 1; });
    }
    void operator++(int) const && {
        change([](Value old) { return old + 1; });
    }
    void operator--(int) const && {
        change([](Value old) { return old - 1; });
    }
};

// The same bytes as another type. Whether the address suits it is asked when it is used.
template <typename T, typename U, Space S>
Pointer<std::conditional_t<std::is_const<U>::value, const T, T>, S> cast(Pointer<U, S> p) {
    return {p.memory, p.offset};
}

// A plain pointer to n elements, for functions that know no other. They count as read (const) or written as a whole,
// here and now.
template <typename T, Space S> T *raw(Pointer<T, S> p, ptrdiff_t n, Place at) {
    void *address = touch(p.memory, p.offset, static_cast<size_t>(n) * sizeof(T), alignof(T),
                          std::is_const<T>::value ? READ : WRITE, at);
    if (address == nullptr) abandon();
    return static_cast<T *>(address);
}

template <typename T, Space S, typename F> std::remove_cv_t<T> update(Pointer<T, S> p, F change, Place at) {
    static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value ||
                      std::is_same<T, unsigned long long>::value,
                  "atomics are for integers: the order of floating sums would show");
    T     old{};
    void *address = touch(p.memory, p.offset, sizeof(T), alignof(T), UPDATE, at);
    if (address == nullptr) return old;
    memcpy(&old, address, sizeof old);
    T value = change(old);
    memcpy(address, &value, sizeof value);
    publish(p.memory, p.offset);
    return old;
}

// Runs a kernel; what it gets is converted once, as a device copies it once.
template <typename... P, typename... A>
void launch(const char *name, dim3 grid, dim3 block, size_t dynamic_bytes, void *stream, void (*kernel)(P...),
            A &&...arguments) {
    struct Turn {
        explicit Turn(void *of) {
            if (hooks.before != nullptr) hooks.before(of);
        }
        ~Turn() {
            if (hooks.after != nullptr) hooks.after();
        }
    } turn(stream);
    std::tuple<std::remove_cv_t<P>...> copies(static_cast<A &&>(arguments)...);
    run_grid(name, reinterpret_cast<const void *>(kernel), grid, block, dynamic_bytes,
             [&copies, kernel]() { std::apply(kernel, copies); });
}

// Global memory for a test: n elements with a name for the reports, gone at the end of the scope.
template <typename T> class Buffer {
    std::vector<T> elements;
    Memory        *memory;

  public:
    // Undefined: all bits set (floats: NaN), and reading is reported until a kernel has written.
    Buffer(const char *name, size_t n) : elements(n) {
        if (n > 0) memset(static_cast<void *>(elements.data()), 0xff, n * sizeof(T));
        memory = add_memory(name, elements.data(), n * sizeof(T), false);
    }
    Buffer(const char *name, const std::vector<T> &values) : elements(values) {
        memory = add_memory(name, elements.data(), values.size() * sizeof(T), true);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { remove_memory(elements.data()); }

    T                    *data() { return elements.data(); }
    const std::vector<T> &values() const { return elements; }
    void                  set(const std::vector<T> &values) { put(0, values.data(), values.size()); }
    // A part of it: n elements from `at` on.
    void put(size_t at, const void *from, size_t n) {
        if (n == 0) return;
        memcpy(static_cast<void *>(elements.data() + at), from, n * sizeof(T));
        memset(memory->defined + at * sizeof(T), 1, n * sizeof(T));
    }
};

} // namespace simt

using simt::Place; // of the functions that CUDA names

#endif
