#if canImport(CoreML) && !arch(x86_64)
import Darwin
import Foundation
import PacklightCore

/// Speed and memory of a model on this device.
public struct Measured: Sendable {
    public let prefillTokensPerSecond: Double
    public let decodeTokensPerSecond: Double
    /// Bytes that count against the app's limit.
    public let footprint: Int

    public init(
        prefillTokensPerSecond: Double, decodeTokensPerSecond: Double, footprint: Int
    ) {
        self.prefillTokensPerSecond = prefillTokensPerSecond
        self.decodeTokensPerSecond = decodeTokensPerSecond
        self.footprint = footprint
    }

    public var description: String {
        String(
            format: "prefill %.1f tokens/s, decode %.1f tokens/s, footprint %.0f MB",
            prefillTokensPerSecond, decodeTokensPerSecond, Double(footprint) / 1e6)
    }
}

extension Decoder {
    /// Times a prompt and single tokens, after a first run of both that is not counted.
    public func measure(prompt: Int = 128, decoded: Int = 64) throws -> Measured {
        let count = max(1, min(prompt, file.context - decoded))
        let ids = (0..<count).map { 3 + $0 % max(1, file.vocabSize - 3) }
        let clock = ContinuousClock()
        var times: [Duration] = []
        for _ in 0..<2 {
            reset()
            var logits: [[Float]] = []
            let first = try clock.measure { logits = try append(ids) }
            let others = try clock.measure {
                for _ in 0..<decoded {
                    logits = try append([greedy(logits[0])])
                }
            }
            times = [first, others]
        }
        return Measured(
            prefillTokensPerSecond: Double(count) / seconds(times[0]),
            decodeTokensPerSecond: Double(decoded) / seconds(times[1]),
            footprint: footprint())
    }
}

/// A duration in seconds.
public func seconds(_ time: Duration) -> Double {
    Double(time.components.seconds) + Double(time.components.attoseconds) / 1e18
}

/// Xcode's memory gauge: `phys_footprint` of the process, in bytes; 0 where the kernel refuses.
public func footprint() -> Int {
    var info = task_vm_info_data_t()
    let size = MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size
    var count = mach_msg_type_number_t(size)
    let status = withUnsafeMutablePointer(to: &info) {
        $0.withMemoryRebound(to: integer_t.self, capacity: size) {
            task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
        }
    }
    return status == KERN_SUCCESS ? Int(info.phys_footprint) : 0
}
#endif
