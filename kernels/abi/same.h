// same.h: compares a declaration of ours with one of a vendor's header as the C ABI sees them: the names of types
// and parameters may differ, what is passed may not.
#pragma once

#include <type_traits>

namespace abi {

template <class T> constexpr bool number = std::is_integral_v<T> || std::is_enum_v<T>;

// complete: sizeof(T) is known. Opaque structs of ours have no contents, those of the vendor may.
template <class T, class = void> struct Complete : std::false_type {};
template <class T> struct Complete<T, std::void_t<decltype(sizeof(T))>> : std::true_type {};

// prefix<A, B>: A is the beginning of B, which has grown; said where a size in the struct tells the library.
template <class A, class B> constexpr bool prefix = false;

// same: numbers of the same size (an enumeration is passed like an integer), the same floating-point type,
// pointers to the same (void * for a handle), structs of the same size.
template <class A, class B> constexpr bool same() {
	if constexpr (std::is_pointer_v<A> || std::is_pointer_v<B>) {
		if constexpr (std::is_pointer_v<A> && std::is_pointer_v<B>) {
			using P = std::remove_pointer_t<A>;
			using Q = std::remove_pointer_t<B>;
			if constexpr (std::is_const_v<P> != std::is_const_v<Q>) return false;
			using U = std::remove_cv_t<P>;
			using V = std::remove_cv_t<Q>;
			if constexpr (std::is_class_v<U> && std::is_class_v<V>) {
				if constexpr (Complete<U>::value && Complete<V>::value)
					return sizeof(U) == sizeof(V) || prefix<U, V>;
				else
					return true; // what nobody looks into
			} else if constexpr (std::is_void_v<U> && std::is_class_v<V>) {
				return !Complete<V>::value;
			} else {
				return same<U, V>();
			}
		}
		return false;
	} else if constexpr (std::is_void_v<A> || std::is_void_v<B>) {
		return std::is_void_v<A> && std::is_void_v<B>;
	} else if constexpr (number<A> && number<B>) {
		return sizeof(A) == sizeof(B);
	} else if constexpr (std::is_class_v<A> && std::is_class_v<B>) {
		return sizeof(A) == sizeof(B) && alignof(A) == alignof(B);
	} else {
		return std::is_same_v<A, B>;
	}
}

template <class A, class B> struct SameFunction : std::false_type {};
template <class R, class... P, class S, class... Q> struct SameFunction<R (*)(P...), S (*)(Q...)> {
	static constexpr bool parameters() {
		if constexpr (sizeof...(P) != sizeof...(Q))
			return false;
		else
			return (same<P, Q>() && ... && true);
	}
	static constexpr bool value = same<R, S>() && parameters();
};

// What must not be taken for the same, so that the comparison itself can fail.
struct Small { int a; };
struct Large { int a[2]; };
struct Opaque;
enum Some { kSome };
static_assert(SameFunction<int (*)(void *), int (*)(Opaque *)>::value && !SameFunction<int (*)(void *), int (*)(Small *)>::value);
static_assert(SameFunction<int (*)(int *, Some), Some (*)(int *, int)>::value);
static_assert(!SameFunction<int (*)(int), int (*)(long)>::value && !SameFunction<int (*)(int), int (*)(int, int)>::value);
static_assert(!SameFunction<int (*)(int *), int (*)(long *)>::value && !SameFunction<int (*)(int *), int (*)(int **)>::value);
static_assert(!SameFunction<int (*)(int *), int (*)(const int *)>::value && !SameFunction<int (*)(int), int (*)(float)>::value);
static_assert(!SameFunction<int (*)(Small), int (*)(Large)>::value && !SameFunction<int (*)(Small *), int (*)(Large *)>::value);
static_assert(!SameFunction<void (*)(int), int (*)(int)>::value && !SameFunction<float (*)(), double (*)()>::value);

} // namespace abi

#define ABI_FUNCTION(ours, theirs) static_assert(abi::SameFunction<ours, decltype(&theirs)>::value, "prototype of " #theirs)
#define ABI_VALUE(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs), #theirs)
