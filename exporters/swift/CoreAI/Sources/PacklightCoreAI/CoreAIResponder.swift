import CoreAILanguageModels
import Foundation
import FoundationModels
import PacklightModel

/// A Core AI bundle in FoundationModels, whose session keeps the history of a chat.
///
///     let responder = try await openResponder(build) { try await CoreAIResponder(bundle: $0) }
public final class CoreAIResponder: Responder {
    public let session: LanguageModelSession

    public init(bundle: URL) async throws {
        session = LanguageModelSession(model: try await CoreAILanguageModel(resourcesAt: bundle))
    }

    public func respond(to prompt: String) async throws -> String {
        try await session.respond(to: prompt).content
    }
}
