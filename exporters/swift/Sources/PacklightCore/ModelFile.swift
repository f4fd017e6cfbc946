import Foundation

/// `model.json`: what an app must know of the model beside it.
public struct ModelFile: Decodable, Sendable {
    public struct Memory: Decodable, Sendable {
        public let weightsBytes: Int
        public let kvCacheBytes: Int
        public let activationBytes: Int
        public let totalBytes: Int
    }

    public let name: String
    public let hubId: String?
    public let license: String?
    public let format: String
    public let package: String
    public let bytes: Int
    public let context: Int
    public let vocabSize: Int
    public let bosId: Int?
    public let stopIds: [Int]
    public let chatTemplate: String?
    public let memory: Memory
}

/// `parity.json`: token ids of texts, and logits that packlight's evaluator computed.
public struct ParityFile: Decodable, Sendable {
    public struct Text: Decodable, Sendable {
        public let text: String
        public let ids: [Int]
    }

    public let texts: [Text]
    public let logits: ParityLogits?
    public let whyNoLogits: String?
}

/// Reads a JSON file of packlight's, whose keys are in snake_case.
public func read<Document: Decodable>(_ kind: Document.Type, from data: Data) throws -> Document {
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    return try decoder.decode(kind, from: data)
}

/// Reads a JSON file of packlight's in a model's folder.
public func read<Document: Decodable>(
    _ kind: Document.Type, named name: String, in folder: URL
) throws -> Document {
    try read(kind, from: Data(contentsOf: folder.appendingPathComponent(name)))
}
