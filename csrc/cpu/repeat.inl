// repeat<N>(f) calls f(0) .. f(N - 1) with constants. Loops that a compiler unrolls later leave their arrays in memory;
// these keep them in registers. Included by every implementation in its own namespace.

template <class F, int... I>
inline TORCHMIX_INLINE void repeat_each(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

template <int N, class F>
inline TORCHMIX_INLINE void repeat(const F& f) {
  repeat_each(f, std::make_integer_sequence<int, N>{});
}
