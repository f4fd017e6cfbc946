import Foundation
import XCTest

@testable import PacklightCore

final class CoreTests: XCTestCase {
    let logits = """
        {"runtime": "r", "ids": [1], "prefill": 1, "top_1": [2], "margins": [1.0],
         "token_ids": [[2, 0]], "values": [[3.0, 2.0]],
         "tolerance": {"absolute": 0.25, "measured_on_a_device": false}}
        """

    func testDifferencesAreFound() throws {
        let expected = try read(ParityLogits.self, from: Data(logits.utf8))
        XCTAssertNil(expected.difference(of: [2, 0, 3], at: 0))
        XCTAssertNil(expected.difference(of: [2.2, 0, 2.8], at: 0))
        XCTAssertNotNil(expected.difference(of: [2.3, 0, 3], at: 0))
        XCTAssertNotNil(expected.difference(of: [2, 4, 3], at: 0))
        XCTAssertNotNil(expected.difference(of: [.nan, 0, 3], at: 0))
        XCTAssertNotNil(expected.difference(of: [2, 0], at: 0))
    }

    func testSampling() {
        var random = SystemRandomNumberGenerator()
        XCTAssertEqual(Sampler().next([0, 5, 1], using: &random), 1)
        let narrow = Sampler(temperature: 1, topP: 0.5)
        for _ in 0..<100 {
            XCTAssertEqual(narrow.next([0, 5, 1], using: &random), 1)
        }
        let drawn = (0..<200).map { _ in
            Sampler(temperature: 1, topP: 1).next([0, 0], using: &random)
        }
        XCTAssertEqual(Set(drawn), [0, 1])
    }
}
