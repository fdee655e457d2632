#include "clustering/kmeans.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "common/parallel.hpp"
#include "common/sizes.hpp"
#include "simd/instruction_sets.hpp"
#include "simd/kernels.inc.hpp"

// All distances come from products: |x - c|^2 = |x|^2 - 2 x.c + |c|^2 about the mean, where products lose least. Rows
// are read as they lie, a few at a time, and multiplied with all centres (or all candidates of all runs) at once; what
// is wanted of the products is taken while they are in the first cache. A block of rows is the work of one thread, and
// what blocks add up is merged in their order.

namespace codeact {
namespace {

constexpr std::int64_t kBlock = 512;                       // rows
constexpr std::int64_t kSlice = 64;                        // features
constexpr std::int64_t kMostParts = 16;                    // of the rows that move, each with sums of its own,
constexpr std::int64_t kMostSums = std::int64_t{4} << 20;  // which are so many together
constexpr float kCancelled = 1e-3F;  // of |x|^2 + |c|^2: a smaller squared distance by products has lost its digits
constexpr double kAlike = 1 - 1e-6;  // two runs often end in the same clusters under other numbers
constexpr std::int64_t kLine = 16;   // floats of a line of the cache
constexpr std::int64_t kSums = 16;   // of a sum of products, so that they go side by side

inline void prefetch(const float* at) {
#if defined(__GNUC__)
  __builtin_prefetch(at);
#else
  static_cast<void>(at);
#endif
}

template <class Term>
float sum_of(std::int64_t count, const Term& term) {
  float sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (std::int64_t j = 0; j < kSums; ++j) sums[j] += term(i + j);
  for (; i < count; ++i) sums[i % kSums] += term(i);
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

float square(const float* row, std::int64_t features) {
  return sum_of(features, [row](std::int64_t i) { return row[i] * row[i]; });
}

float squared_distance(const float* a, const float* b, std::int64_t features) {
  return sum_of(features, [a, b](std::int64_t i) { return (a[i] - b[i]) * (a[i] - b[i]); });
}

// Some columns (centres, candidates) packed, and their squares.
class Columns {
 public:
  Columns(const Kernels& kernels, std::int64_t features) : k_(kernels), features_(features) {}

  void set(const float* data, std::int64_t count) {
    count_ = count;
    const std::int64_t panels = ceil_div(count, k_.panel_columns);
    stride_ = panels * k_.panel_columns;
    packed_.resize(as_size(stride_ * features_));
    squares_.resize(as_size(count));
    const std::int64_t bytes = features_ * 4;
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const std::int64_t first = panel * k_.panel_columns;
      k_.pack_panel(reinterpret_cast<const unsigned char*>(data) + first * bytes, bytes,
                    static_cast<int>(std::min<std::int64_t>(k_.panel_columns, count - first)), features_, false,
                    packed_.data() + first * features_);
    }
    for (std::int64_t i = 0; i < count; ++i) squares_[as_size(i)] = square(data + i * features_, features_);
  }

  std::int64_t count() const { return count_; }
  float squared(std::int64_t column) const { return squares_[as_size(column)]; }

  // use(row, products) for the rows of [begin, end), at(row) being where a row lies.
  template <class At, class Use>
  void each_row(std::int64_t begin, std::int64_t end, LargeArray<float>& scratch, const At& at, const Use& use) const {
    scratch.resize(as_size(k_.tile_rows * stride_));
    const float* tile[kMostRows];
    for (std::int64_t row = begin; row < end; row += k_.tile_rows) {
      for (int r = 0; r < k_.tile_rows; ++r) tile[r] = at(std::min(row + r, end - 1));
      // A tile reads all its rows side by side, too many streams for the CPU to see coming.
      for (std::int64_t r = row + k_.tile_rows; r < std::min(row + 2 * k_.tile_rows, end); ++r)
        for (std::int64_t f = 0; f < features_; f += kLine) prefetch(at(r) + f);
      k_.multiply_rows(tile, features_, packed_.data(), count_, scratch.data(), stride_);
      for (std::int64_t r = row; r < std::min(row + k_.tile_rows, end); ++r)
        use(r, scratch.data() + (r - row) * stride_);
    }
  }

  std::int32_t nearest(const float* products) const {
    std::int32_t best = 0;
    float least = squares_[0] / 2 - products[0];
    for (std::int64_t c = 1; c < count_; ++c) {
      const float score = squares_[as_size(c)] / 2 - products[c];
      if (score < least) least = score, best = static_cast<std::int32_t>(c);
    }
    return best;
  }

 private:
  static constexpr int kMostRows = 16;  // of a tile
  const Kernels& k_;
  std::int64_t features_;
  std::int64_t count_ = 0;
  std::int64_t stride_ = 0;
  LargeArray<std::uint32_t> packed_;  // (panels, features, panel columns)
  std::vector<float> squares_;
};

class Solver {
 public:
  Solver(const KMeans& problem, const Kernels& kernels, int threads)
      : p_(problem), columns_(kernels, problem.features), blocks_(ceil_div(problem.count, kBlock)) {
    const auto work = static_cast<double>(p_.count) * static_cast<double>(p_.features);
    threads_ = worthwhile_threads(work * static_cast<double>(p_.clusters), threads);
    scratch_.resize(as_size(threads_));
    centre_rows();
    result_.labels.resize(as_size(p_.count));
    result_.passes = 0;
  }

  Clusters solve() {
    const LargeArray<float> starts = draw_starts();
    double tightest = 0;
    for (std::int64_t run = 0; run < p_.runs; ++run) {
      const auto begin = starts.begin() + static_cast<std::ptrdiff_t>(run * p_.clusters * p_.features);
      centres_.assign(begin, begin + static_cast<std::ptrdiff_t>(p_.clusters * p_.features));
      const double inertia = iterate();
      if (run > 0 && inertia >= kAlike * tightest) continue;
      tightest = inertia;
      result_.labels = labels_;
      result_.centres = centres_;
    }
    return std::move(result_);
  }

 private:
  const float* row(std::int64_t index) const { return rows_.data() + index * p_.features; }

  template <class Work>  // work(thread, block, begin, end)
  void each_block(const Work& work) {
    share(threads_, blocks_, [&](int thread, std::int64_t block) {
      work(thread, block, block * kBlock, std::min(p_.count, (block + 1) * kBlock));
    });
  }

  template <class Use>
  void each_product(const Use& use) {  // use(block, row, products)
    ++result_.passes;
    each_block([&](int thread, std::int64_t block, std::int64_t begin, std::int64_t end) {
      columns_.each_row(
          begin, end, scratch_[as_size(thread)], [this](std::int64_t r) { return row(r); },
          [&](std::int64_t r, const float* products) { use(block, r, products); });
    });
  }

  void centre_rows() {
    result_.mean.resize(as_size(p_.features));
    share(threads_, ceil_div(p_.features, kSlice), [&](int, std::int64_t slice) {
      const std::int64_t first = slice * kSlice;
      const std::int64_t end = std::min(p_.features, first + kSlice);
      double sums[kSlice] = {};
      for (std::int64_t r = 0; r < p_.count; ++r)
        for (std::int64_t f = first; f < end; ++f) sums[f - first] += double{p_.rows[r * p_.features + f]};
      for (std::int64_t f = first; f < end; ++f)
        result_.mean[as_size(f)] = static_cast<float>(sums[f - first] / static_cast<double>(p_.count));
    });
    rows_.resize(as_size(p_.count * p_.features));
    squares_.resize(as_size(p_.count));
    each_block([&](int, std::int64_t, std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        float* centred = rows_.data() + r * p_.features;
        for (std::int64_t f = 0; f < p_.features; ++f)
          centred[f] = p_.rows[r * p_.features + f] - result_.mean[as_size(f)];
        squares_[as_size(r)] = square(centred, p_.features);
      }
    });
    total_ = std::accumulate(squares_.begin(), squares_.end(), 0.0);
    stop_ = p_.tolerance * total_ / static_cast<double>(p_.count * p_.features);
  }

  // (runs, k, D): of some candidates, drawn by their squared distance, the one that leaves least. All runs at once, as
  // a pass over the rows costs nearly the same for one.
  LargeArray<float> draw_starts() {
    const std::int64_t width = p_.features;
    LargeArray<float> starts(as_size(p_.runs * p_.clusters * width));
    LargeArray<float> nearest(as_size(p_.runs * p_.count));
    std::fill(nearest.begin(), nearest.end(), HUGE_VALF);
    LargeArray<float> left(as_size(p_.runs * p_.trials * p_.count));
    std::vector<std::int64_t> candidates(p_.first, p_.first + p_.runs);
    for (std::int64_t step = 0; step < p_.clusters; ++step) {
      if (step > 0) draw_candidates(nearest, step - 1, candidates);
      const std::vector<double> sums = distances_left(candidates, nearest, left);
      const std::int64_t trials = std::ssize(candidates) / p_.runs;
      share(threads_, p_.runs, [&](int, std::int64_t run) {
        const auto of_run = sums.begin() + run * trials;
        const std::int64_t best = run * trials + (std::min_element(of_run, of_run + trials) - of_run);
        std::copy_n(left.begin() + best * p_.count, p_.count, nearest.begin() + run * p_.count);
        std::copy_n(row(candidates[as_size(best)]), width, starts.begin() + (run * p_.clusters + step) * width);
      });
    }
    return starts;
  }

  void draw_candidates(const LargeArray<float>& nearest, std::int64_t draw, std::vector<std::int64_t>& candidates) {
    candidates.resize(as_size(p_.runs * p_.trials));
    share(threads_, p_.runs, [&](int, std::int64_t run) {
      std::vector<double> cumulated(as_size(p_.count));
      double sum = 0;
      for (std::int64_t r = 0; r < p_.count; ++r)
        cumulated[as_size(r)] = sum += double{nearest[as_size(run * p_.count + r)]};
      for (std::int64_t trial = 0; trial < p_.trials; ++trial) {
        const double at = p_.draws[(run * (p_.clusters - 1) + draw) * p_.trials + trial] * sum;
        const auto found = std::lower_bound(cumulated.begin(), cumulated.end(), at) - cumulated.begin();
        candidates[as_size(run * p_.trials + trial)] = std::min<std::int64_t>(found, p_.count - 1);
      }
    });
  }

  // Of every candidate the squared distances that are left with it, (candidates, N), and their sums.
  std::vector<double> distances_left(const std::vector<std::int64_t>& candidates, const LargeArray<float>& nearest,
                                     LargeArray<float>& left) {
    const std::int64_t count = std::ssize(candidates);
    const std::int64_t trials = count / p_.runs;
    LargeArray<float> data(as_size(count * p_.features));
    for (std::int64_t c = 0; c < count; ++c)
      std::copy_n(row(candidates[as_size(c)]), p_.features, data.begin() + c * p_.features);
    columns_.set(data.data(), count);
    std::vector<double> sums(as_size(blocks_ * count), 0.0);
    each_product([&](std::int64_t block, std::int64_t r, const float* products) {
      for (std::int64_t c = 0; c < count; ++c) {
        const float scale = squares_[as_size(r)] + columns_.squared(c);
        float distance = scale - 2 * products[c];
        if (distance < kCancelled * scale)
          distance = squared_distance(row(r), row(candidates[as_size(c)]), p_.features);
        distance = std::min(distance, nearest[as_size(c / trials * p_.count + r)]);
        left[as_size(c * p_.count + r)] = distance;
        sums[as_size(block * count + c)] += double{distance};
      }
    });
    for (std::int64_t block = 1; block < blocks_; ++block)
      for (std::int64_t c = 0; c < count; ++c) sums[as_size(c)] += sums[as_size(block * count + c)];
    sums.resize(as_size(count));
    return sums;
  }

  // From centres_ on; leaves labels_ and centres_, returns the sum of the squared distances to the means.
  double iterate() {
    sums_.assign(as_size(p_.clusters * p_.features), 0.0);
    counts_.assign(as_size(p_.clusters), 0);
    label_all();
    LargeArray<std::int32_t> before(as_size(p_.count), -1);
    std::vector<std::int64_t> moved(as_size(p_.count));
    std::iota(moved.begin(), moved.end(), 0);
    move(moved, before);
    for (std::int64_t iteration = 0; iteration < p_.iterations; ++iteration) {
      if (std::find(counts_.begin(), counts_.end(), 0) != counts_.end()) fill_empty();
      const double shift = move_centres();
      before = labels_;
      label_all();
      moved.clear();
      for (std::int64_t r = 0; r < p_.count; ++r)
        if (labels_[as_size(r)] != before[as_size(r)]) moved.push_back(r);
      move(moved, before);
      if (moved.empty() || shift <= stop_) break;
    }
    double inertia = total_;
    for (std::int64_t c = 0; c < p_.clusters; ++c) {
      double squares = 0;
      for (std::int64_t f = 0; f < p_.features; ++f) squares += std::pow(sums_[as_size(c * p_.features + f)], 2);
      if (counts_[as_size(c)] > 0) inertia -= squares / static_cast<double>(counts_[as_size(c)]);
    }
    return inertia;
  }

  void label_all() {
    columns_.set(centres_.data(), p_.clusters);
    labels_.resize(as_size(p_.count));
    each_product(
        [&](std::int64_t, std::int64_t r, const float* products) { labels_[as_size(r)] = columns_.nearest(products); });
  }

  // Takes rows from the clusters they were in, -1 for none, to those they are in.
  void move(const std::vector<std::int64_t>& rows, const LargeArray<std::int32_t>& before) {
    for (const std::int64_t r : rows) {
      if (before[as_size(r)] >= 0) --counts_[as_size(before[as_size(r)])];
      ++counts_[as_size(labels_[as_size(r)])];
    }
    // Parts with sums of their own, as many as the rows are worth, whatever the number of threads.
    const std::int64_t size = p_.clusters * p_.features;
    const std::int64_t most = std::clamp<std::int64_t>(kMostSums / size, 1, kMostParts);
    const std::int64_t parts = std::clamp<std::int64_t>(std::ssize(rows) / kBlock, 1, most);
    std::vector<double> sums(as_size(parts * size), 0.0);
    share(threads_, parts, [&](int, std::int64_t part) {
      const auto end = std::ssize(rows) * (part + 1) / parts;
      for (auto i = std::ssize(rows) * part / parts; i < end; ++i) {
        const std::int64_t r = rows[as_size(i)];
        const std::int32_t from = before[as_size(r)];
        if (from >= 0) add(row(r), -1, sums.data() + part * size + from * p_.features);
        add(row(r), 1, sums.data() + part * size + labels_[as_size(r)] * p_.features);
      }
    });
    for (std::int64_t part = 0; part < parts; ++part)
      for (std::int64_t i = 0; i < size; ++i) sums_[as_size(i)] += sums[as_size(part * size + i)];
  }

  void add(const float* values, double sign, double* sums) const {
    for (std::int64_t f = 0; f < p_.features; ++f) sums[f] += sign * double{values[f]};
  }

  // To the means; an empty cluster's stays. Returns the squared shift of all together.
  double move_centres() {
    double shift = 0;
    for (std::int64_t c = 0; c < p_.clusters; ++c) {
      if (counts_[as_size(c)] == 0) continue;
      for (std::int64_t f = 0; f < p_.features; ++f) {
        float& centre = centres_[as_size(c * p_.features + f)];
        const auto mean =
            static_cast<float>(sums_[as_size(c * p_.features + f)] / static_cast<double>(counts_[as_size(c)]));
        shift += double{mean - centre} * double{mean - centre};
        centre = mean;
      }
    }
    return shift;
  }

  // Gives each empty cluster the row that is farthest from its own centre, while there are rows that are off it.
  void fill_empty() {
    std::vector<float> distances(as_size(p_.count));
    each_block([&](int, std::int64_t, std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        distances[as_size(r)] =
            squared_distance(row(r), centres_.data() + labels_[as_size(r)] * p_.features, p_.features);
    });
    std::vector<std::int64_t> farthest(as_size(p_.count));
    std::iota(farthest.begin(), farthest.end(), 0);
    const auto empty = std::count(counts_.begin(), counts_.end(), 0);
    std::partial_sort(farthest.begin(), farthest.begin() + empty, farthest.end(), [&](std::int64_t a, std::int64_t b) {
      return distances[as_size(a)] != distances[as_size(b)] ? distances[as_size(a)] > distances[as_size(b)] : a < b;
    });
    farthest.resize(as_size(empty));
    std::erase_if(farthest, [&](std::int64_t r) { return distances[as_size(r)] == 0; });
    const LargeArray<std::int32_t> before = labels_;
    auto next = farthest.begin();
    for (std::int64_t c = 0; c < p_.clusters && next != farthest.end(); ++c)
      if (counts_[as_size(c)] == 0) labels_[as_size(*next++)] = static_cast<std::int32_t>(c);
    move(farthest, before);
  }

  const KMeans& p_;
  Columns columns_;
  std::int64_t blocks_;
  int threads_;
  std::vector<LargeArray<float>> scratch_;  // a thread
  LargeArray<float> rows_;                  // (N, D), less the mean
  LargeArray<float> squares_;               // (N,)
  double total_ = 0;
  double stop_ = 0;
  Clusters result_;

  // Of one run.
  LargeArray<float> centres_;
  LargeArray<std::int32_t> labels_;
  std::vector<double> sums_;  // (k, D)
  std::vector<std::int64_t> counts_;
};

}  // namespace

Clusters kmeans(const KMeans& problem, int threads, std::string_view instruction_set) {
  return Solver(problem, kernels_of(instruction_set, Element::float32), threads).solve();
}

void nearest_centres(const float* rows, std::int64_t count, const Clusters& clusters, std::int32_t* labels, int threads,
                     std::string_view instruction_set) {
  const std::int64_t features = std::ssize(clusters.mean);
  const Kernels& kernels = kernels_of(instruction_set, Element::float32);
  Columns columns(kernels, features);
  columns.set(clusters.centres.data(), std::ssize(clusters.centres) / features);
  const double work = static_cast<double>(count) * static_cast<double>(clusters.centres.size());
  share(worthwhile_threads(work, threads), ceil_div(count, kBlock), [&](int, std::int64_t block) {
    const std::int64_t begin = block * kBlock;
    const std::int64_t end = std::min(count, begin + kBlock);
    LargeArray<float> centred(as_size((end - begin) * features));
    for (std::int64_t r = begin; r < end; ++r)
      for (std::int64_t f = 0; f < features; ++f)
        centred[as_size((r - begin) * features + f)] = rows[r * features + f] - clusters.mean[as_size(f)];
    LargeArray<float> scratch;
    columns.each_row(
        begin, end, scratch, [&](std::int64_t r) { return centred.data() + (r - begin) * features; },
        [&](std::int64_t r, const float* products) { labels[r] = columns.nearest(products); });
  });
}

}  // namespace codeact
