#if canImport(CoreML) && !arch(x86_64)
import Foundation
import PacklightCore
import PacklightModel
import Tokenizers
import XCTest

/// One run on a device shows that it computes what packlight's evaluator computed.
final class ParityTests: XCTestCase {
    /// `PACKLIGHT_MODEL`; else the folder `coreml` in the app's bundle, where tests have a host
    /// app, as on a phone; else the folder around this package.
    static var folder: URL {
        if let path = ProcessInfo.processInfo.environment["PACKLIGHT_MODEL"] {
            return URL(fileURLWithPath: path)
        }
        if let bundled = Bundle.main.url(forResource: "coreml", withExtension: nil) {
            return bundled
        }
        return (0..<4).reduce(URL(fileURLWithPath: #filePath)) { url, _ in
            url.deletingLastPathComponent()
        }
    }

    override func setUpWithError() throws {
        let file = try read(ModelFile.self, named: "model.json", in: Self.folder)
        try XCTSkipUnless(file.format == "coreml", "a Core AI bundle: its tests are in CoreAI/")
    }

    func testLogits() async throws {
        let parity = try read(ParityFile.self, named: "parity.json", in: Self.folder)
        guard let expected = parity.logits else {
            throw XCTSkip(parity.whyNoLogits ?? "parity.json has no logits")
        }
        let decoder = try await Decoder(folder: Self.folder)
        var rows = try decoder.append(Array(expected.ids.prefix(expected.prefill)), all: true)
        for id in expected.ids.dropFirst(expected.prefill) {
            rows += try decoder.append([id])
        }
        XCTAssertEqual(rows.count, expected.ids.count)
        for (position, row) in rows.enumerated() {
            if let problem = expected.difference(of: row, at: position) {
                XCTFail(problem)
            }
        }
        print(try decoder.measure().description)
    }

    func testTokenizer() async throws {
        let parity = try read(ParityFile.self, named: "parity.json", in: Self.folder)
        let tokenizer = try await AutoTokenizer.from(modelFolder: Self.folder)
        for pair in parity.texts {
            XCTAssertEqual(tokenizer.encode(text: pair.text), pair.ids, pair.text)
        }
    }
}
#endif
