// swift run -c release measure-coreai [FOLDER]: speed and memory of the bundle on this Mac. On a phone,
// an app calls `CoreAIBundle(folder:).measure()`.
import Foundation
import PacklightCoreAI

let folder = URL(fileURLWithPath: CommandLine.arguments.dropFirst().first ?? "../..")
print(try await CoreAIBundle(folder: folder).measure().description)
