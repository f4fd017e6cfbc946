/// Logits at some positions of one sequence, and how far a device may be from them.
public struct ParityLogits: Decodable, Sendable {
    public struct Tolerance: Decodable, Sendable {
        public let absolute: Float
    }

    public let runtime: String
    public let ids: [Int]
    public let prefill: Int
    public let top1: [Int]
    public let margins: [Float]
    public let tokenIds: [[Int]]
    public let values: [[Float]]
    public let tolerance: Tolerance

    /// What is wrong with a device's logits at one position; nil if nothing is.
    public func difference(of row: [Float], at position: Int) -> String? {
        var largest: Float = 0
        for (id, value) in zip(tokenIds[position], values[position]) {
            guard id < row.count else { return "position \(position): \(row.count) logits" }
            guard row[id].isFinite else { return "position \(position): logit \(id) is \(row[id])" }
            largest = max(largest, abs(row[id] - value))
        }
        if largest > tolerance.absolute {
            return "position \(position): a logit differs by \(largest), "
                + "allowed are \(tolerance.absolute)"
        }
        // Two logits may each move by the tolerance; closer ones may change places.
        let found = greedy(row)
        if margins[position] > 2 * tolerance.absolute && found != top1[position] {
            return "position \(position): the most likely token is \(found), not \(top1[position])"
        }
        return nil
    }
}
