// For the app's own target, not part of the package: needs iOS 27 or macOS 27 and the product
// CoreAILM of https://github.com/apple/coreai-models.
//
//     let responder = try await openResponder(build) { try await CoreAIResponder(bundle: $0) }
import CoreAILanguageModels
import Foundation
import FoundationModels
import PacklightModel

@available(iOS 27, macOS 27, *)
final class CoreAIResponder: Responder {
    private let session: LanguageModelSession

    init(bundle: URL) async throws {
        session = LanguageModelSession(model: try await CoreAILanguageModel(resourcesAt: bundle))
    }

    func respond(to prompt: String) async throws -> String {
        try await session.respond(to: prompt).content
    }
}
