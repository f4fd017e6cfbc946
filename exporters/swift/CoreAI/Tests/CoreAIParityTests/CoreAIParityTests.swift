import Foundation
import PacklightCore
import PacklightCoreAI
import Tokenizers
import XCTest

/// One run on a device shows that it computes what Apple's CPU runtime computed on Linux.
final class CoreAIParityTests: XCTestCase {
    /// `PACKLIGHT_MODEL`; else the folder `coreai` in the app's bundle, where tests have a host
    /// app, as on a phone; else the folder around this package.
    static var folder: URL {
        if let path = ProcessInfo.processInfo.environment["PACKLIGHT_MODEL"] {
            return URL(fileURLWithPath: path)
        }
        if let bundled = Bundle.main.url(forResource: "coreai", withExtension: nil) {
            return bundled
        }
        return (0..<5).reduce(URL(fileURLWithPath: #filePath)) { url, _ in
            url.deletingLastPathComponent()
        }
    }

    func testLogits() async throws {
        let parity = try read(ParityFile.self, named: "parity.json", in: Self.folder)
        guard let expected = parity.logits else {
            throw XCTSkip(parity.whyNoLogits ?? "parity.json has no logits")
        }
        let bundle = try CoreAIBundle(folder: Self.folder)
        compare(try await bundle.logits(of: expected.ids), expected, from: 0)
        let prefill = expected.prefill
        let cached = try await bundle.logits(of: expected.ids, prefill: prefill)
        compare(cached, expected, from: prefill - 1)
        print(try await bundle.measure().description)
    }

    private func compare(_ rows: [[Float]], _ expected: ParityLogits, from first: Int) {
        XCTAssertEqual(rows.count, expected.ids.count - first)
        for (index, row) in rows.enumerated() {
            if let problem = expected.difference(of: row, at: first + index) {
                XCTFail(problem)
            }
        }
    }

    func testTokenizer() async throws {
        let parity = try read(ParityFile.self, named: "parity.json", in: Self.folder)
        let folder = Self.folder.appendingPathComponent("tokenizer")
        let tokenizer = try await AutoTokenizer.from(modelFolder: folder)
        for pair in parity.texts {
            XCTAssertEqual(tokenizer.encode(text: pair.text), pair.ids, pair.text)
        }
    }
}
