#if canImport(CoreML) && !arch(x86_64)
import Foundation
import PacklightCore
import Tokenizers

/// Answers prompts, whatever framework runs the model.
public protocol Responder {
    func respond(to prompt: String) async throws -> String
}

/// The best responder that a device can run.
///
/// - Parameters:
///   - folder: of a build, with `coreml/`, `coreai/` or both.
///   - coreAI: opens a Core AI bundle: `{ try await CoreAIResponder(bundle: $0) }` of the package in
///     `CoreAI/`. This one does not import it, because it would then need iOS 27.
public func openResponder(
    _ folder: URL, coreAI: ((URL) async throws -> any Responder)? = nil
) async throws -> any Responder {
    let bundle = folder.appendingPathComponent("coreai")
    let package = folder.appendingPathComponent("coreml")
    let files = FileManager.default
    if #available(iOS 27, macOS 27, *), let coreAI,
        files.fileExists(atPath: bundle.path)
    {
        do {
            return try await coreAI(bundle)
        } catch where files.fileExists(atPath: package.path) {
            print("Core AI refuses the model, Core ML is tried: \(error)")
        }
    }
    return try await CoreMLResponder(folder: package)
}

/// A Core ML package with the tokenizer of its folder: nothing is downloaded.
public final class CoreMLResponder: Responder {
    public let decoder: Decoder
    public let tokenizer: any Tokenizer
    public var sampler = Sampler()
    public var mostTokens = 256

    public init(folder: URL) async throws {
        decoder = try await Decoder(folder: folder)
        tokenizer = try await AutoTokenizer.from(modelFolder: folder)
    }

    public func respond(to prompt: String) async throws -> String {
        let ids: [Int]
        if decoder.file.chatTemplate != nil {
            ids = try tokenizer.applyChatTemplate(messages: [["role": "user", "content": prompt]])
        } else {
            ids = tokenizer.encode(text: prompt)
        }
        return tokenizer.decode(tokens: try generate(after: ids), skipSpecialTokens: true)
    }

    /// New ids after a prompt, until a stop id, `mostTokens` or the end of the context.
    public func generate(after ids: [Int]) throws -> [Int] {
        decoder.reset()
        var random = SystemRandomNumberGenerator()
        var made: [Int] = []
        var logits = try decoder.append(ids)
        while let last = logits.last, made.count < mostTokens {
            let next = sampler.next(last, using: &random)
            if decoder.file.stopIds.contains(next) || Task.isCancelled {
                break
            }
            made.append(next)
            if decoder.length == decoder.file.context {
                break
            }
            logits = try decoder.append([next])
        }
        return made
    }
}
#endif
