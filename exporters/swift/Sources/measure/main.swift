// swift run -c release measure [FOLDER]: speed and memory of the model on this Mac. On a phone, an
// app calls `decoder.measure()`.
#if canImport(CoreML) && !arch(x86_64)
import Foundation
import PacklightModel

let folder = URL(fileURLWithPath: CommandLine.arguments.dropFirst().first ?? "..")
let decoder = try await Decoder(folder: folder)
print(try decoder.measure().description)
#else
print("Core ML needs a Mac with Apple silicon, or an iPhone")
#endif
