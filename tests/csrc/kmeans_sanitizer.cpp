// kmeans and nearest_centres under address and undefined-behaviour sanitizers: vectors in memory of just their size,
// every label compared with the nearest centre in float64, for every instruction set that this machine has.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "clustering/kmeans.hpp"
#include "simd/instruction_sets.hpp"

namespace {

void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

double distance(const float* row, const codeact::Clusters& found, std::int64_t cluster, std::int64_t features) {
  double sum = 0;
  for (std::int64_t f = 0; f < features; ++f) {
    const auto at = static_cast<std::size_t>(f);
    const double off = double{row[f]} - double{found.mean[at]} -
                       double{found.centres[static_cast<std::size_t>(cluster * features) + at]};
    sum += off * off;
  }
  return sum;
}

void check(std::int64_t count, std::int64_t features, std::int64_t clusters, std::string_view set,
           std::mt19937& random) {
  const auto rows = std::make_unique<float[]>(static_cast<std::size_t>(count * features));
  std::normal_distribution<float> normal(1, 2);
  const std::int64_t distinct = 1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(count));
  for (std::int64_t i = 0; i < count * features; ++i)
    rows[static_cast<std::size_t>(i)] =
        i < distinct * features ? normal(random) : rows[static_cast<std::size_t>(i - distinct * features)];
  const std::int64_t runs = 1 + random() % 3;
  const std::int64_t trials = 1 + random() % 4;
  std::vector<std::int64_t> first;
  std::vector<double> draws;
  std::uniform_real_distribution<double> uniform(0, 1);
  for (std::int64_t run = 0; run < runs; ++run)
    first.push_back(static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(count)));
  for (std::int64_t i = 0; i < runs * (clusters - 1) * trials; ++i) draws.push_back(uniform(random));
  const codeact::KMeans problem{.rows = rows.get(),
                                .count = count,
                                .features = features,
                                .clusters = clusters,
                                .first = first.data(),
                                .draws = draws.data(),
                                .runs = runs,
                                .trials = trials,
                                .tolerance = 1e-4,
                                .iterations = 20};
  const codeact::Clusters one = codeact::kmeans(problem, 1, set);
  const codeact::Clusters three = codeact::kmeans(problem, 3, set);
  const std::string name = std::string(set) + ": " + std::to_string(count) + " x " + std::to_string(features) + ", k " +
                           std::to_string(clusters);
  if (one.labels != three.labels || one.centres != three.centres) fail(name + ": threads change the clusters");
  const auto labels = std::make_unique<std::int32_t[]>(static_cast<std::size_t>(count));
  codeact::nearest_centres(rows.get(), count, one, labels.get(), 2, set);
  for (std::int64_t row = 0; row < count; ++row) {
    const std::int32_t label = labels[static_cast<std::size_t>(row)];
    if (label < 0 || label >= clusters) fail(name + ": a label is no cluster");
    const float* at = rows.get() + row * features;
    const double own = distance(at, one, label, features);
    for (std::int64_t cluster = 0; cluster < clusters; ++cluster)
      if (distance(at, one, cluster, features) < own - 1e-4 * static_cast<double>(features))
        fail(name + ": a centre is nearer than that of the label");
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const std::string_view set : codeact::instruction_sets()) {
    for (int round = 0; round < 60; ++round) {
      const std::int64_t count = 1 + static_cast<std::int64_t>(random() % 1200);
      const std::int64_t most = count < 130 ? count : 130;
      check(count, 1 + static_cast<std::int64_t>(random() % 70),
            1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(most)), set, random);
    }
  }
  std::puts("k-means: all labels are right");
}
