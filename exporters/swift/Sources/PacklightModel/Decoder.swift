// Float16 does not exist on Intel Macs.
#if canImport(CoreML) && !arch(x86_64)
import CoreML
import Foundation
import PacklightCore

public enum DecoderError: Error {
    case tooLong(context: Int)
    case noLogits
}

/// A Core ML package with its KV cache, called as packlight's evaluator calls it.
public final class Decoder {
    /// Ids of one call: Core ML returns the logits of all of them, `vocabSize` values each.
    static let chunk = 64

    public let file: ModelFile
    public private(set) var length = 0
    private let model: MLModel
    private var state: MLState

    /// Flexible shapes run on the CPU and the GPU; `.all` asks the Neural Engine, too.
    public init(folder: URL, computeUnits: MLComputeUnits = .cpuAndGPU) async throws {
        file = try read(ModelFile.self, named: "model.json", in: folder)
        let package = folder.appendingPathComponent(file.package)
        let settings = MLModelConfiguration()
        settings.computeUnits = computeUnits
        model = try await MLModel.load(
            contentsOf: Self.compiled(package), configuration: settings)
        state = model.makeState()
    }

    /// The compiled model: shipped by Xcode, kept from an earlier launch, or compiled now.
    static func compiled(_ package: URL) async throws -> URL {
        let files = FileManager.default
        let shipped = package.deletingPathExtension().appendingPathExtension("mlmodelc")
        if files.fileExists(atPath: shipped.path) {
            return shipped
        }
        let manifest = package.appendingPathComponent("Manifest.json")
        let changed = try files.attributesOfItem(atPath: manifest.path)[.modificationDate] as? Date
        let caches = try files.url(
            for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        let seconds = Int(changed?.timeIntervalSince1970 ?? 0)
        let name = "\(package.deletingPathExtension().lastPathComponent)-\(seconds).mlmodelc"
        let kept = caches.appendingPathComponent(name)
        if !files.fileExists(atPath: kept.path) {
            let made = try await MLModel.compileModel(at: package)
            try files.moveItem(at: made, to: kept)
        }
        return kept
    }

    /// Empties the cache.
    public func reset() {
        state = model.makeState()
        length = 0
    }

    /// Appends ids; the logits after the last of them, or after each.
    public func append(_ ids: [Int], all: Bool = false) throws -> [[Float]] {
        guard length + ids.count <= file.context else {
            throw DecoderError.tooLong(context: file.context)
        }
        var rows: [[Float]] = []
        for start in stride(from: 0, to: ids.count, by: Self.chunk) {
            let stop = min(start + Self.chunk, ids.count)
            let found = try call(Array(ids[start..<stop]), all: all)
            rows = all ? rows + found : found
        }
        return rows
    }

    private func call(_ ids: [Int], all: Bool) throws -> [[Float]] {
        let tokens = try MLMultiArray(shape: [1, NSNumber(value: ids.count)], dataType: .int32)
        tokens.withUnsafeMutableBytes { bytes, _ in
            let values = bytes.bindMemory(to: Int32.self)
            for (index, id) in ids.enumerated() {
                values[index] = Int32(id)
            }
        }
        // The program makes the causal mask itself and adds this one: zeros. Its last size is where
        // the ids end in the cache.
        let end = length + ids.count
        let mask = try MLMultiArray(shape: [1, 1, 1, NSNumber(value: end)], dataType: .float16)
        mask.withUnsafeMutableBytes { bytes, _ in
            _ = bytes.initializeMemory(as: UInt8.self, repeating: 0)
        }
        let inputs = try MLDictionaryFeatureProvider(
            dictionary: ["inputIds": tokens, "causalMask": mask])
        let outputs = try model.prediction(from: inputs, using: state)
        guard let logits = outputs.featureValue(for: "logits")?.multiArrayValue else {
            throw DecoderError.noLogits
        }
        length = end
        let step = logits.strides[1].intValue
        return logits.withUnsafeBytes { bytes in
            let values = bytes.bindMemory(to: Float16.self)
            return (all ? 0..<ids.count : (ids.count - 1)..<ids.count).map { row in
                (0..<file.vocabSize).map { Float(values[row * step + $0]) }
            }
        }
    }
}
#endif
