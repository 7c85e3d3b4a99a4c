"""The document's sentences in both languages, by key. Numbers come in the same order in both."""

from __future__ import annotations

from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

WORDS: dict[str, tuple[str, str]] = {
    # title and environment
    "title": ("{shape}: MHA and FFN measured apart", "{shape}：MHA/FFN 分离测量结果"),
    "environment": ("Test environment", "测试环境"),
    "machine": ("Machine", "机器"),
    "no_gpu": ("no GPU: computed on the CPU", "没有 GPU：在 CPU 上计算"),
    "disk": ("Disk", "磁盘"),
    "reader": ("Reader", "读取引擎"),
    "versions": ("Versions", "版本"),
    "model": ("Model", "模型"),
    "model_line": (
        "D {hidden}, F {intermediate}, HQ/H {heads}/{kv_heads}, K {head_dim}, {layers} layers, bf16, random weights",
        "D {hidden}，F {intermediate}，HQ/H {heads}/{kv_heads}，K {head_dim}，{layers} 层，bf16，随机权重",
    ),
    "method": ("Method", "方法"),
    "method_line": (
        "{rounds} rounds, in each everything measured once more by turns, after a warm-up. A figure is the median of "
        "the rounds' medians (a roof: the highest rate seen); ± reaches over all rounds{trimmed}, and at least "
        "{floor}, since what changes between runs does not show in one. Every sample is in report.json. Executed "
        "passes stream {streamed} layers, all from SSD. GiB = 2^30 bytes.",
        "共 {rounds} 轮，预热之后每轮轮流测量所有项目。每个数值是各轮中位数的中位数（上限：见到的最高速度）；"
        "± 覆盖{trimmed}所有轮次，且至少 {floor}，因为多次运行之间的变化在一次运行内看不到。"
        "所有样本都在 report.json 中。实际执行的流水线流式读取 {streamed} 层，全部来自 SSD。GiB = 2^30 字节。",
    ),
    "trimmed": (" but the {count} lowest and as many of the highest", "除最低和最高各 {count} 轮以外的"),
    "memory_line": (
        "Memory: host at most {dram} of {dram_needed} said before{gpu}",
        "内存：主机最多 {dram}，事先声明 {dram_needed}{gpu}",
    ),
    "memory_gpu": ("; GPU {gpu} of {gpu_needed}", "；GPU {gpu}，事先声明 {gpu_needed}"),
    "left_out": ("Left out, and what to know", "未测量的部分与说明"),
    "nothing_left_out": ("Nothing was left out.", "没有遗漏任何部分。"),
    # weights
    "weights": ("Weight sizes", "权重大小"),
    "weights_line": (
        "{kind} weights: {size} ({count} parameters): {names}",
        "{kind} 权重：{size}（{count} 参数）：{names}",
    ),
    "total": ("Total", "总计"),
    # compute
    "compute_time": ("Compute time (compute alone, no I/O)", "计算时间（纯计算，无 IO）"),
    "prefill": ("Prefill ({tokens} tokens)", "Prefill 阶段（{tokens} tokens）"),
    "decode": ("Decode (1 token after {tokens})", "Decode 阶段（1 个 token，之前 {tokens} 个）"),
    "part": ("Part", "组件"),
    "time": ("Time", "时间"),
    "share": ("Share", "占比"),
    "mean": ("Mean", "平均"),
    "least": ("Min", "最小"),
    "most": ("Max", "最大"),
    "deviation": ("Std. dev.", "标准差"),
    "samples": ("Samples", "样本数"),
    "roof_share": ("Share of roof", "达到上限的"),
    "whole_layer": ("Whole layer", "整层"),
    "weight_size": ("Weights", "权重大小"),
    "speed": ("Speed", "速度"),
    "findings": ("Findings", "关键发现"),
    "dominates": (
        "{kind} takes {share} of the compute of {phase}, and {weights} of the weights.",
        "{kind} 占 {share} 的 {phase} 计算时间，占 {weights} 的权重。",
    ),
    "spread": (
        "{kind} varies most: its standard deviation is {deviation} of its mean.",
        "{kind} 波动最大：标准差是平均值的 {deviation}。",
    ),
    "versus": ("Prefill against decode", "Prefill 与 Decode 对比"),
    "ratio": ("Ratio", "倍数"),
    # links and roofs
    "io": ("I/O time", "IO 时间"),
    "h2d": ("Pinned memory → GPU", "Pin→GPU 传输时间"),
    "ssd": ("SSD → pinned memory", "SSD→Pin 读取时间"),
    "no_h2d": (
        "No GPU here: the CPU computes from the memory that reads land in, and nothing is copied.",
        "这里没有 GPU：CPU 直接在读入的内存上计算，不需要拷贝。",
    ),
    "row": ("All sublayers in a row, a layer", "所有子层连续读取，每层"),
    "row_line": (
        "In a row, the queue never empty, a layer takes {row}; its two sublayers one after the other {alone}.",
        "连续读取（队列不空）时每层 {row}；两个子层逐个读取时 {alone}。",
    ),
    "roofs": ("Roofs of this machine, measured in the same rounds", "本机的上限（同一轮次中测得）"),
    "roof": ("Roof", "上限"),
    "roof.memory": ("Memory read", "内存读取"),
    "roof.matmul": ("bf16 matrix product", "bf16 矩阵乘"),
    "roof.h2d": ("One large copy, host → GPU", "主机→GPU 单次大拷贝"),
    "roof.ssd": ("Disk, plain preadv in 8 threads", "磁盘，8 线程 preadv"),
    # overlap
    "overlap": ("What can overlap", "重叠可行性分析"),
    "serial": ("One after the other", "串行执行"),
    "serial_total": ("total {ms}", "总时间 {ms}"),
    "serial_part": ("{kind} {link}: {ms} ({share})", "{kind} {link}：{ms}（{share}）"),
    "link.compute": ("compute", "计算"),
    "link.h2d": ("pinned → GPU", "Pin→GPU"),
    "link.ssd": ("SSD → pinned", "SSD→Pin"),
    "within": ("Within a sublayer", "层内流水线分析"),
    "hidden": (
        "{kind}: compute {compute}, I/O {io}, so at least {bound}: compute hides the I/O.",
        "{kind}：计算 {compute}，IO {io}，瓶颈 {bound}：计算可以完全隐藏 IO。",
    ),
    "not_hidden": (
        "{kind}: compute {compute}, I/O {io}, so at least {bound}: compute waits {wait}.",
        "{kind}：计算 {compute}，IO {io}，瓶颈 {bound}：计算需要额外等待 {wait}。",
    ),
    "pipelines": ("Pipelines, a layer", "流水线（每层）"),
    "pipeline": ("Pipeline", "流水线"),
    "speedup": ("Speed-up over serial", "相对串行的加速"),
    "of_bound": ("Bound / this", "下界 / 该值"),
    "p.serial": ("serial", "串行"),
    "p.ideal": ("sum of sublayer maxima (“ideal”)", "各子层最大值之和（“理想流水线”）"),
    "p.bound": ("bound across layers: slowest link, {link}", "跨层下界：最慢的环节，{link}"),
    "p.predicted": ("predicted by the plan", "计划预测"),
    "p.split": ("executed, by sublayer", "实际执行，按子层"),
    "p.whole": ("executed, by whole layers", "实际执行，按整层"),
    "prefetch": ("Prefetch distance", "预取距离"),
    "prefetch_line": (
        "{kind}: one transfer takes as long as {count} of its own computes; to be hidden behind those alone, it would "
        "have to start as many layers ahead.",
        "{kind}：一次传输相当于 {count} 次自身计算；若只靠自身计算来隐藏，需要提前同样多的层数开始。",
    ),
    "prefetch_hidden": (
        "{kind}: one transfer takes less time than one of its own computes, which hides it.",
        "{kind}：一次传输短于一次自身计算，可以被它隐藏。",
    ),
    "prefetch_beyond": (
        "{count} layers ahead, in a model of {layers}: no prefetch hides it, the link itself is the bound.",
        "提前 {count} 层，而模型共 {layers} 层：预取无法隐藏，瓶颈就是该环节本身。",
    ),
    "prefetch_used": (
        "The executed passes kept {count} sublayers ahead in {staging} of pinned memory and reached {reached} of the "
        "bound.",
        "实际执行时预取 {count} 个子层，使用 {staging} 锁页内存，达到下界的 {reached}。",
    ),
    # insight
    "insight": ("Key insights", "关键洞察"),
    "nature": ("Compute", "计算特性对比"),
    "trait": ("Trait", "特性"),
    "prefill_share": ("Share of prefill compute", "Prefill 计算占比"),
    "decode_share": ("Share of decode compute", "Decode 计算占比"),
    "intensity": ("FLOP a byte of weights, prefill", "每字节权重的 FLOP（Prefill）"),
    "balance": ("I/O against compute", "IO 与计算的平衡"),
    "balance_bound": (
        "{phase} is bound by {link}, {ms} a layer; the next slowest is {next}, {next_ms}.",
        "{phase} 受限于 {link}，每层 {ms}；次慢的是 {next}，{next_ms}。",
    ),
    "ssd_wanted": (
        "{phase}: an SSD of {speed} would no longer be what limits it; this one reads {now} in a row.",
        "{phase}：SSD 达到 {speed} 后不再是瓶颈；目前连续读取速度为 {now}。",
    ),
    "changes": ("What to change: predicted for all {layers} layers", "优化建议：对全部 {layers} 层的预测"),
    "changes_line": (
        "Simulated with the measured times, each change by itself; a gain is against the first row of its table, and "
        "as sure as the times it is made of. Compute in few bits counts as measured in bf16.",
        "用测得的时间模拟，每项改动单独计算；提升相对于各表第一行，其可靠性取决于所用的测量值。"
        "低位宽的计算时间按 bf16 的实测值计。",
    ),
    "situation.ssd": ("As measured: all weights on SSD", "与测量时相同：全部权重在 SSD 上"),
    "situation.memory": ("Weights in {memory} as far as they fit", "权重尽量放入 {memory}"),
    "situation.published": (
        "{situation}, {model} as published (F {width} instead of {measured}; FFN times scaled by the bytes)",
        "{situation}，已发布的 {model}（F 为 {width} 而非 {measured}；FFN 时间按字节数缩放）",
    ),
    "in_published": ("{model} as published, F {width}. {situation}", "已发布的 {model}，F {width}。{situation}"),
    "in_ssd": ("All from SSD: ", "全部来自 SSD："),
    "in_memory": ("Within memory: ", "使用内存："),
    "change": ("Situation", "情形"),
    "seconds": ("s a pass", "每遍秒数"),
    "bound_by": ("bound by", "受限于"),
    "gain": ("gain", "提升"),
    "as it is": ("as it is", "现状"),
    "SSD twice as fast": ("SSD twice as fast", "SSD 速度加倍"),
    "32 GiB more DRAM": ("32 GiB more DRAM", "增加 32 GiB 内存"),
    "FFN in int8": ("FFN in int8", "FFN 用 int8"),
    "FFN in int4": ("FFN in int4", "FFN 用 int4"),
    "all in int8": ("all in int8", "全部用 int8"),
    "all in int4": ("all in int4", "全部用 int4"),
    "SSD": ("SSD", "SSD"),
    "copy": ("copy", "拷贝"),
    "compute": ("compute", "计算"),
    # split against whole
    "split": ("Split against whole layer", "与整层测试的对比"),
    "figure": ("Figure", "指标"),
    "whole": ("Whole layer", "整层"),
    "sum": ("MHA + FFN", "MHA+FFN 分离"),
    "difference": ("Difference", "差异"),
    "compute.prefill": ("Prefill compute", "Prefill 计算"),
    "compute.decode": ("Decode compute", "Decode 计算"),
    "pass.prefill": ("Prefill pass, executed", "Prefill 实际执行"),
    "pass.decode": ("Decode pass, executed", "Decode 实际执行"),
    "staging": ("Pinned memory of the stream", "流式读取的锁页内存"),
    "same_within": (
        "The difference is within the uncertainty for: {names}.",
        "差异在不确定度之内的有：{names}。",
    ),
    "differ": ("Beyond the uncertainty differ: {names}.", "差异超出不确定度的有：{names}。"),
    # conclusion
    "conclusion": ("Conclusion", "结论"),
    "concluded": (
        "{phase}: serial {serial}; a sum of maxima would take {ideal} ({ideal_speedup}); the bound is {bound}, by "
        "{link}; executed {executed}, {reached} of the bound.",
        "{phase}：串行 {serial}；各子层最大值之和 {ideal}（{ideal_speedup}）；下界 {bound}，受限于 "
        "{link}；实际执行 {executed}，达到下界的 {reached}。",
    ),
    "memory_helps": (
        "{phase}: weights kept in this machine's memory as far as they fit, instead of all on SSD: {seconds} s a pass "
        "instead of {ssd_seconds} s, {gain}.",
        "{phase}：将权重尽量放在本机内存中而不是全部在 SSD 上：每遍 {seconds} s，而不是 {ssd_seconds} s，{gain}。",
    ),
    "most_help": (
        "{phase}: of what mhaffn can do today, this helps most: {name}, {gain}.",
        "{phase}：在 mhaffn 目前能做的改动中，最有效的是 {name}，{gain}。",
    ),
    "no_help": (
        "{phase}: none of the changes that mhaffn can do today gains more than 2 %.",
        "{phase}：mhaffn 目前能做的改动中，没有一项提升超过 2 %。",
    ),
    # left out
    "h2d_no_gpu": (
        "Copies to the GPU and the GPU's memory: there is no GPU here.",
        "到 GPU 的拷贝和 GPU 内存：这里没有 GPU。",
    ),
    "whole_layer_passes_memory": (
        "Passes by whole layers: they do not fit into the memory budget beside the others.",
        "按整层执行：内存预算容不下。",
    ),
    "whole_layer_passes_time": (
        "Passes by whole layers: there was no time for them; --seconds gives more.",
        "按整层执行：时间不够；可用 --seconds 增加。",
    ),
    "fewer_tokens": (
        "The prompt was shortened (measured/asked: {why}): longer ones would take longer than --seconds allows.",
        "提示长度缩短（实测/要求：{why}）：更长的提示超出 --seconds 允许的时间。",
    ),
    "fewer_rounds": (
        "Fewer rounds than usual ({why}): a pass takes long here; --seconds gives more.",
        "轮数少于通常（{why}）：这里一遍耗时较长；可用 --seconds 增加。",
    ),
    "quick": (
        "--quick: fewer layers, shorter prompt and fewer samples than a full run ({why}).",
        "--quick：层数、提示长度和样本数少于完整运行（{why}）。",
    ),
    "noisy": (
        "The machine itself was not steady: between rounds its own roof moved ({why}).",
        "机器本身不稳定：各轮之间上限本身在变化（{why}）。",
    ),
    "busy": (
        "Other programs ran beside this one: up to {why} of the time was lost to waiting for a processor.",
        "有其他程序同时运行：最多 {why} 的时间用于等待处理器。",
    ),
    "page_cache": (
        "Reads went through the page cache, so that SSD figures are partly those of memory ({why}).",
        "读取经过了页缓存，SSD 数据部分反映的是内存速度（{why}）。",
    ),
    "outlook_budget": (
        "The whole model within the budgets cannot be planned: {why}",
        "无法在预算内规划整个模型：{why}",
    ),
    "faster_than_link": (
        "The executed passes were faster than their slowest link measured by itself, by {why} at least. Take the bound "
        "and what is predicted from it as uncertain by as much.",
        "执行的遍比单独测量的最慢链路还快，至少快 {why}。下界及由它得出的预测的不确定度至少与此相当。",
    ),
    "compute_without_graph": (
        "Compute was timed call by call, not as a CUDA graph, so that launches may show ({why}).",
        "计算逐次计时而非用 CUDA graph，可能包含启动开销（{why}）。",
    ),
    "no_matplotlib": (
        "Figures: matplotlib is not installed; pip install 'mhaffn[report]'.",
        "图：未安装 matplotlib；pip install 'mhaffn[report]'。",
    ),
    "no_chinese_font": (
        "Figures are labelled in English: no font with Chinese characters was found (apt-get install fonts-noto-cjk).",
        "图中文字为英文：未找到中文字体（apt-get install fonts-noto-cjk）。",
    ),
    # figures
    "f.shares": ("Who computes, and who takes the time", "计算与时间的构成"),
    "f.io": ("I/O against compute, by sublayer", "各子层的 IO 与计算"),
    "f.timelines": ("One after the other, and as executed", "串行与实际执行"),
    "f.roofline": ("Share reached of this machine's roofs", "达到本机上限的比例"),
    "f.compute_share": ("share of compute", "计算占比"),
    "f.serial_share": ("share of serial time", "串行时间占比"),
    "f.ms": ("milliseconds", "毫秒"),
    "f.ms_log": ("milliseconds (log scale)", "毫秒（对数刻度）"),
    "f.executed": ("executed, {layers} layers", "实际执行，{layers} 层"),
    "f.serial": ("serial, 1 layer", "串行，1 层"),
    "f.bound": ("dashed: the bound", "虚线：下界"),
    "f.intensity": ("operations a byte of weights and cache", "每字节权重与缓存的运算次数"),
    "f.flops": ("operations a second", "每秒运算次数"),
}  # fmt: skip


class Words:
    """The sentences of one language."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._index = LANGUAGES.index(language)

    def __call__(self, key: str, **values: object) -> str:
        return WORDS[key][self._index].format(**values)

    def or_as_is(self, text: str) -> str:
        """Names that others give, where they are known here."""
        return WORDS[text][self._index] if text in WORDS else text
