import CoreAILanguageModels
import Foundation
import PacklightCore
import PacklightModel

/// Logits and speed of a Core AI bundle in Apple's runner.
public struct CoreAIBundle {
    public let folder: URL
    public let file: ModelFile

    public init(folder: URL) throws {
        self.folder = folder
        file = try read(ModelFile.self, named: "model.json", in: folder)
    }

    /// The engine that returns logits. The one that an app gets samples on the GPU.
    private func sequential() async throws -> any InferenceEngine {
        try await CoreAIRunner(contentsOf: folder, variant: "coreai-sequential")
            .makeInferenceEngine()
    }

    /// The logits after each id, all ids in one call.
    public func logits(of ids: [Int]) async throws -> [[Float]] {
        // The engine gives the logits before each id of a continuation.
        let options = InferenceOptions(
            includeLogits: true, forcedContinuation: (ids.dropFirst() + ids.prefix(1)).map { Int32($0) })
        return try await rows(after: ids.prefix(1).map { Int32($0) }, options, sequential())
    }

    /// The logits after the id before `prefill` and after each that follows, through the cache.
    public func logits(of ids: [Int], prefill: Int) async throws -> [[Float]] {
        let engine = try await sequential()
        let options = InferenceOptions(maxTokens: 1, includeLogits: true)
        var found: [[Float]] = []
        for end in prefill...ids.count {  // the engine computes what its cache lacks
            found += try await rows(after: ids.prefix(end).map { Int32($0) }, options, engine)
        }
        return found
    }

    private func rows(
        after ids: [Int32], _ options: InferenceOptions, _ engine: some InferenceEngine
    ) async throws -> [[Float]] {
        var found: [[Float]] = []
        let outputs = try await engine.generate(
            with: ids, samplingConfiguration: .greedy, inferenceOptions: options)
        for try await output in outputs {
            found.append((output.logits ?? []).map { Float($0) })
        }
        return found
    }

    /// Times a prompt and single tokens, after a first run of both that is not counted.
    public func measure(prompt: Int = 128, decoded: Int = 64) async throws -> Measured {
        let engine = try await CoreAIRunner(contentsOf: folder).makeInferenceEngine()
        return try await measure(prompt: prompt, decoded: decoded, engine)
    }

    private func measure(
        prompt: Int, decoded: Int, _ engine: some InferenceEngine
    ) async throws -> Measured {
        let count = max(1, min(prompt, file.context - decoded - 1))
        let ids = (0..<count).map { Int32(3 + $0 % max(1, file.vocabSize - 3)) }
        let options = InferenceOptions(maxTokens: decoded + 1)
        let clock = ContinuousClock()
        var prefill = 0.0
        var decode = 0.0
        for _ in 0..<2 {
            try await engine.reset()
            let start = clock.now
            var first: ContinuousClock.Instant?
            let outputs = try await engine.generate(
                with: ids, samplingConfiguration: .greedy, inferenceOptions: options)
            for try await _ in outputs where first == nil {
                first = clock.now
            }
            prefill = seconds(start.duration(to: first ?? clock.now))
            decode = seconds((first ?? start).duration(to: clock.now))
        }
        return Measured(
            prefillTokensPerSecond: Double(count) / prefill,
            decodeTokensPerSecond: Double(decoded) / decode,
            footprint: footprint())
    }
}
