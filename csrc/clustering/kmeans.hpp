// Lloyd's k-means with greedy k-means++ starts; draws, stop and empty clusters as in scikit-learn.
//
// N rows, D features of a row, k clusters.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/large_array.hpp"

namespace codeact {

struct KMeans {
  const float* rows;  // (N, D), finite
  std::int64_t count;
  std::int64_t features;
  std::int64_t clusters;      // 1..N
  const std::int64_t* first;  // (runs,), the row at which each run begins
  const double* draws;        // (runs, k - 1, trials), 0..1, by which its other centres are drawn
  std::int64_t runs;
  std::int64_t trials;
  double tolerance;  // of the variance: a smaller shift of all centres together ends a run
  std::int64_t iterations;
};

struct Clusters {
  LargeArray<std::int32_t> labels;  // (N,)
  LargeArray<float> centres;        // (k, D), less the mean
  LargeArray<float> mean;           // (D,), of all rows
  std::int64_t passes;              // over all rows, of all runs
};

// The tightest run; of runs that are alike the first. Sums have one order, so that the number of threads, of which at
// most `threads` run, changes no bit. Extra memory: a copy of the rows, and (runs * trials, N) floats.
// Throws std::invalid_argument for an instruction set that is not here.
Clusters kmeans(const KMeans& problem, int threads, std::string_view instruction_set);

// labels (rows,), out: the nearest centre of each row, of equal ones the first.
void nearest_centres(const float* rows, std::int64_t count, const Clusters& clusters, std::int32_t* labels, int threads,
                     std::string_view instruction_set);

}  // namespace codeact
